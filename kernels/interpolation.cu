// Interpolative decompositions from pivoted QR: S[order] = [I; T] S[order[:rank]] + what is left.
// Cheng, Gimbutas, Martinsson, Rokhlin, SIAM J. Sci. Comput. 26 (2005).
//
//   pivots  (nodes, m), r (nodes, k, m) upper trapezoidal by rows: from pivoted_qr
//   padding (nodes, m): 1 where a row of S is padding, by rows of S
//   order   (nodes, m) out: pivots up to the numerical rank, then real rows, then padding
//   place   (nodes, m) out: where in the pivots the rows of `order` stand
//   tails   (nodes, k + 1) double: from pivoted_qr
//   noise   (nodes,) double: squared rounding error of the samples
//   ranks   (nodes,) out: leading tails above the noise, of diagonal values not 0, at most rank
//   basis   (nodes, m - rank, rank) out: T, 0 in columns beyond the numerical rank
//   x       (nodes, rank, m - rank): T^T while it is solved for
//
// Launch, one after the other:
// interpolation_order: nodes blocks of 32, 64, ... or 512 threads. Shared memory: 64 bytes.
// interpolation: nodes ceil((m - rank) / 32) blocks of (32, w) threads, w = 8 or another divisor
// of 32; 32 columns of R each. Shared memory: 2112 sizeof(T) bytes.
//
// A warp has a run of the rows past the rank: it counts the real ones, and when all are counted it
// knows where its own go. R1 X = R2 by back substitution, 32 unknowns at a time: one warp solves for them, a lane a
// column, and all warps take them out of the rows above. R1 is read from L2 by every block of a
// node: rank^2 / 2 values for rank^2 32 flops.
#include "common.cuh"

constexpr int BLOCK = 32;
constexpr int PITCH = BLOCK + 1;  // odd, against bank conflicts

// How many leading tails are above the noise; the same in all lanes.
template <class T>
__device__ int numerical_rank(const T* r, int m, const double* tails, double noise, int limit,
                              int lane) {
    int found = 0;
    for (int first = 0; first < limit; first += 32) {
        const int i = first + lane;
        const bool above = i < limit && tails[i] > noise && r[Index(i) * m + i] != T(0);
        const unsigned votes = __ballot_sync(FULL_WARP, above);
        found += votes == FULL_WARP ? 32 : __ffs(~votes) - 1;
        if (votes != FULL_WARP) break;
    }
    return found;
}

// Past the numerical rank any row will do as a skeleton row: real ones before padding.
template <class T>
__device__ void interpolation_order(const Index* pivots, const T* r, const double* tails,
                                    const double* noise, const unsigned char* padding,
                                    Index* order, int* place, Index* ranks, int m, int k,
                                    int rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Index node = blockIdx.x;
    pivots += node * m;
    padding += node * m;
    order += node * m;
    place += node * m;
    DYN_SHARED(shared);
    int* const counts = take<int>(shared, warps);

    const int numerical = numerical_rank(r + node * k * m, m, tails + node * (k + 1),
                                         noise[node], min(rank, k), lane);
    if (threadIdx.x == 0) ranks[node] = numerical;
    for (int i = threadIdx.x; i < numerical; i += blockDim.x) {
        place[i] = i;
        order[i] = pivots[i];
    }

    const int run = ((m - numerical + warps - 1) / warps + 31) / 32 * 32;
    const int begin = min(m, numerical + warp * run), end = min(m, begin + run);
    int reals = 0;
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        reals += __popc(__ballot_sync(FULL_WARP, i < end && !padding[pivots[min(i, m - 1)]]));
    }
    if (lane == 0) counts[warp] = reals;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < warps; ++w) {
        if (w < warp) before += counts[w];
        all += counts[w];
    }
    int real = numerical + before, padded = begin + all - before;
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        const Index row = pivots[min(i, m - 1)];
        const bool pad = i < end && padding[row];
        const unsigned pads = __ballot_sync(FULL_WARP, pad), earlier = (1u << lane) - 1;
        const unsigned rest = __ballot_sync(FULL_WARP, i < end && !pad);
        if (i < end) {
            const int to = pad ? padded + __popc(pads & earlier) : real + __popc(rest & earlier);
            place[to] = i;
            order[to] = row;
        }
        padded += __popc(pads);
        real += __popc(rest);
    }
}

template <class T>
__device__ void interpolation(const T* r, const int* place, const Index* ranks, T* basis, T* x,
                              int m, int k, int rank) {
    const int columns = m - rank, tiles = (columns + BLOCK - 1) / BLOCK;
    const int tile = blockIdx.x % tiles, lane = threadIdx.x, warp = threadIdx.y;
    const int warps = blockDim.y;
    const Index node = blockIdx.x / tiles;
    r += node * k * m;

    DYN_SHARED(shared);
    T* const triangle = take<T>(shared, BLOCK * PITCH);  // of R1 on the diagonal, that inverted
    T* const unknowns = take<T>(shared, BLOCK * PITCH);  // by rows
    const int numerical = int(ranks[node]);

    const int column = tile * BLOCK + lane;
    const bool inside = column < columns;
    const int source = inside ? place[node * m + rank + column] : 0;
    x += node * rank * columns + column;  // row i belongs to warp i % warps throughout
    for (int i = warp; i < numerical && inside; i += warps)
        x[Index(i) * columns] = r[Index(i) * m + source];
    for (int first = (numerical - 1) / BLOCK * BLOCK; first >= 0 && numerical > 0;
         first -= BLOCK) {
        const int width = min(BLOCK, numerical - first);
        for (int i = warp; i < width; i += warps) {
            if (lane < width) {
                const T value = r[Index(first + i) * m + first + lane];
                triangle[i * PITCH + lane] = lane == i ? T(1) / value : value;
            }
            unknowns[i * PITCH + lane] = inside ? x[Index(first + i) * columns] : T(0);
        }
        __syncthreads();
        for (int i = width - 1; i >= 0 && warp == 0; --i) {
            T sum = unknowns[i * PITCH + lane];
#pragma unroll 1
            for (int j = i + 1; j < width; ++j)
                sum -= triangle[i * PITCH + j] * unknowns[j * PITCH + lane];
            unknowns[i * PITCH + lane] = sum * triangle[i * PITCH + i];
        }
        __syncthreads();
        for (int i = warp; i < width && inside; i += warps)
            x[Index(first + i) * columns] = unknowns[i * PITCH + lane];
        for (int i = warp; i < first && inside; i += warps) {
            const T* const row = r + Index(i) * m + first;
            T sum = 0;
#pragma unroll 4
            for (int j = 0; j < width; ++j) sum += row[j] * unknowns[j * PITCH + lane];
            x[Index(i) * columns] -= sum;
        }
        __syncthreads();
    }

    for (int first = 0; first < rank; first += BLOCK) {  // T is the transpose
        for (int i = warp; i < BLOCK; i += warps)
            unknowns[i * PITCH + lane] =
                inside && first + i < numerical ? x[Index(first + i) * columns] : T(0);
        __syncthreads();
        for (int i = warp; i < BLOCK; i += warps) {
            const Index row = node * columns + tile * BLOCK + i;
            if (tile * BLOCK + i < columns && first + lane < rank)
                basis[row * rank + first + lane] = unknowns[lane * PITCH + i];
        }
        __syncthreads();
    }
}

#define INTERPOLATION(suffix, T)                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 2) interpolation_order_##suffix(           \
        const long long* pivots, const T* r, const double* tails, const double* noise,           \
        const unsigned char* padding, long long* order, int* place, long long* ranks, int m,     \
        int k, int rank) {                                                                       \
        interpolation_order<T>(pivots, r, tails, noise, padding, order, place, ranks, m, k,      \
                               rank);                                                            \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 3)                                         \
        interpolation_##suffix(const T* r, const int* place, const long long* ranks, T* basis,   \
                               T* x, int m, int k, int rank) {                                   \
        interpolation<T>(r, place, ranks, basis, x, m, k, rank);                                 \
    }
INTERPOLATION(f32, float)
INTERPOLATION(f64, double)
