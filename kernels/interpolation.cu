// Interpolative decompositions from pivoted QR: S[order] = [I; T] S[order[:rank]] + what is left.
// Cheng, Gimbutas, Martinsson, Rokhlin, SIAM J. Sci. Comput. 26 (2005).
//
//   pivots  (nodes, m), r (nodes, k, m) upper trapezoidal by rows: from pivoted_qr
//   padding (nodes, m): 1 where a row of S is padding, by rows of S
//   order   (nodes, m) out: pivots up to the numerical rank, then real rows, then padding
//   basis   (nodes, m - rank, rank) out: T, 0 in columns beyond the numerical rank
//   ranks   (nodes,) out: leading diagonal values of r above noise |r[0, 0]|, at most rank
//   x       (nodes, rank, m - rank): T^T while it is solved for
//
// Launch: nodes max(1, ceil((m - rank) / 32)) blocks of (32, w) threads, w = 8 or another
// divisor of 32; 32 columns of R each.
// Shared memory: 2112 sizeof(T) + 4 (m + 1) bytes.
//
// R1 X = R2 by back substitution, 32 unknowns at a time: one warp solves for them, a lane a
// column, and all warps take them out of the rows above. R1 is read from L2 by every block of a
// node: rank^2 / 2 values for rank^2 32 flops.
#include "common.cuh"

constexpr int BLOCK = 32;
constexpr int PITCH = BLOCK + 1;  // odd, against bank conflicts

__device__ __forceinline__ int lanes_before(unsigned votes) {
    return __popc(votes & ((1u << threadIdx.x) - 1));
}

// How many leading diagonal values are above the noise; the same in all lanes.
template <class T>
__device__ int numerical_rank(const T* r, int m, int limit, T noise) {
    int found = 0;
    for (int first = 0; first < limit; first += 32) {
        const int i = first + threadIdx.x;
        const bool above = i < limit && fabs(r[Index(i) * m + i]) > noise * fabs(r[0]);
        const unsigned votes = __ballot_sync(FULL_WARP, above);
        found += votes == FULL_WARP ? 32 : __ffs(~votes) - 1;
        if (votes != FULL_WARP) break;
    }
    return found;
}

// Past the numerical rank any row will do as a skeleton row: real ones before padding.
__device__ void place_rows(int* place, const Index* pivots, const unsigned char* padding, int m,
                           int numerical) {
    const int lane = threadIdx.x;
    for (int i = lane; i < numerical; i += 32) place[i] = i;
    int real = numerical, padded = numerical;
    for (int first = numerical; first < m; first += 32) {
        const int i = first + lane;
        padded += __popc(__ballot_sync(FULL_WARP, i < m && !padding[pivots[min(i, m - 1)]]));
    }
    for (int first = numerical; first < m; first += 32) {
        const int i = first + lane;
        const bool pad = i < m && padding[pivots[min(i, m - 1)]];
        const unsigned pads = __ballot_sync(FULL_WARP, pad);
        const unsigned reals = __ballot_sync(FULL_WARP, i < m && !pad);
        if (pad) place[padded + lanes_before(pads)] = i;
        else if (i < m) place[real + lanes_before(reals)] = i;
        padded += __popc(pads);
        real += __popc(reals);
    }
}

template <class T>
__device__ void interpolation(const Index* pivots, const T* r, const unsigned char* padding,
                              Index* order, T* basis, Index* ranks, T* x, int m, int k, int rank,
                              T noise) {
    const int columns = m - rank, tiles = max(1, (columns + BLOCK - 1) / BLOCK);
    const int tile = blockIdx.x % tiles, lane = threadIdx.x, warp = threadIdx.y;
    const int warps = blockDim.y;
    const Index node = blockIdx.x / tiles;
    pivots += node * m;
    r += node * k * m;

    DYN_SHARED(shared);
    T* const triangle = take<T>(shared, BLOCK * PITCH);  // of R1 on the diagonal, that inverted
    T* const unknowns = take<T>(shared, BLOCK * PITCH);  // by rows
    int* const place = take<int>(shared, m);             // in the pivots, of every row of `order`
    int* const found = take<int>(shared, 1);

    if (warp == 0) {
        const int numerical = numerical_rank(r, m, min(rank, k), noise);
        place_rows(place, pivots, padding + node * m, m, numerical);
        if (lane == 0) found[0] = numerical;
    }
    __syncthreads();
    const int numerical = found[0];
    if (tile == 0) {
        for (int i = thread_number(); i < m; i += BLOCK * warps)
            order[node * m + i] = pivots[place[i]];
        if (thread_number() == 0) ranks[node] = numerical;
    }

    const int column = tile * BLOCK + lane;
    const bool inside = column < columns;
    const int source = inside ? place[rank + column] : 0;
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

#define INTERPOLATION(name, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(256, 3)                                         \
        name(const long long* pivots, const T* r, const unsigned char* padding,                  \
             long long* order, T* basis, long long* ranks, T* x, int m, int k, int rank,         \
             T noise) {                                                                          \
        interpolation<T>(pivots, r, padding, order, basis, ranks, x, m, k, rank, noise);         \
    }
INTERPOLATION(interpolation_f32, float)
INTERPOLATION(interpolation_f64, double)
