// Triangular solves with up to K = 8 right-hand sides in shared memory, by one thread block;
// gpu_hodlr.kernel_sources inlines it, after common.cuh.
//
// Latency, not bytes, is the floor: m / 32 blocks of unknowns one after the other. Warp 0 solves a
// block with what the other warps staged in the step before, while they already apply the solved
// unknowns to the next rows: one barrier a block. Blocks of 64, 96, ... or 512 threads.
#ifndef GPU_HODLR_TRIANGULAR_SOLVES_CUH
#define GPU_HODLR_TRIANGULAR_SOLVES_CUH

constexpr int BLOCK = 32;         // unknowns solved at a time, one a lane
constexpr int PITCH = BLOCK + 1;  // odd, against bank conflicts
constexpr int TILE_SIZE = BLOCK * PITCH;

// Row i of vectors in shared memory, (blocks, K, BLOCK), so that lanes read neighbours; its columns
// are BLOCK apart.
template <int K, class T>
__device__ __forceinline__ T* unknown(T* x, int i) {
    return x + i / BLOCK * (K * BLOCK) + i % BLOCK;
}

// Two tiles a step: the block of L on the diagonal, and the one through which the unknowns just
// solved enter; doubled, so that the next step's are loaded meanwhile.
template <int K, class T>
struct Shared {
    T* x;  // b, then the solution
    T* tiles;

    __device__ __forceinline__ T* unknown(int i) const { return ::unknown<K>(x, i); }
    __device__ __forceinline__ T* diagonal(int step) const {
        return tiles + step % 2 * 2 * TILE_SIZE;
    }
    __device__ __forceinline__ T* neighbour(int step) const { return diagonal(step) + TILE_SIZE; }
};

// L[row.., column..] by rows; the identity where it passes the end.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, const T* lower, int row, int column, int m,
                                          int warp, int warps) {
    const int lane = threadIdx.x % 32, j = column + lane;
#pragma unroll 2
    for (int q = warp; q < BLOCK; q += warps) {
        const int i = row + q;
        tile[q * PITCH + lane] = i < m && j < m ? lower[Index(i) * m + j] : T(i == j);
    }
}

// Warp 0: the unknowns of a block. Tiles are read by `row` and `column` steps of a lane's own row
// of L, or of L^T, in which unknowns are eliminated from q = 0 up, or from 31 down.
template <int K, bool TRANSPOSE, class T>
__device__ __forceinline__ void solve_block(Shared<K, T> s, int block, int solved, int step,
                                            int lane) {
    constexpr int along = TRANSPOSE ? PITCH : 1;
    const int own = TRANSPOSE ? lane : lane * PITCH;
    const T* const diagonal = s.diagonal(step) + own;
    const T inverse = T(1) / diagonal[lane * along];
    T* const mine = s.unknown(block * BLOCK + lane);
    T rest[K];
#pragma unroll
    for (int c = 0; c < K; ++c) rest[c] = mine[c * BLOCK];
    if (step > 0) {
        const T* const neighbour = s.neighbour(step) + own;
        const T* const x = s.unknown(solved * BLOCK);
#pragma unroll(K > 2 ? 1 : 4)
        for (int q = 0; q < BLOCK; ++q) {
            const T value = neighbour[q * along];
#pragma unroll
            for (int c = 0; c < K; ++c) rest[c] -= value * x[c * BLOCK + q];
        }
    }
#pragma unroll(K > 2 ? 1 : 4)
    for (int p = 0; p < BLOCK; ++p) {
        const int q = TRANSPOSE ? BLOCK - 1 - p : p;
        const bool waiting = TRANSPOSE ? lane < q : lane > q;
        const T value = diagonal[q * along];
#pragma unroll
        for (int c = 0; c < K; ++c) {
            const T x = __shfl_sync(FULL_WARP, rest[c] * inverse, q);
            if (waiting) rest[c] -= value * x;
        }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) mine[c * BLOCK] = rest[c] * inverse;
}

// b -= L x in the rows of a block, by the unknowns of all blocks up to `solved` blocks: one warp
// takes a few rows, its lanes walk them.
template <int K, class T>
__device__ __forceinline__ void apply_to_block(Shared<K, T> s, const T* lower, int block,
                                               int solved, int m, int warp, int warps) {
    constexpr int together = K > 2 ? 2 : 4;
    constexpr int sharers = 32 / (together * K);
    const int lane = threadIdx.x % 32;
    for (int group = warp * together; group < BLOCK; group += warps * together) {
        const int first = block * BLOCK + group, last = m - 1 - first;
        if (last < 0) break;
        const T* const corner = lower + Index(first) * m;
        T sums[together * K] = {};
#pragma unroll(K == 8 ? 1 : 2)
        for (int j = lane; j < solved * BLOCK; j += 32) {
            T values[together];
#pragma unroll
            for (int q = 0; q < together; ++q) values[q] = corner[min(q, last) * m + j];
            const T* const column = s.unknown(j);
#pragma unroll
            for (int c = 0; c < K; ++c) {
                const T x = column[c * BLOCK];
#pragma unroll
                for (int q = 0; q < together; ++q) sums[q * K + c] += values[q] * x;
            }
        }
        const T sum = warp_sums<together * K>(sums);
        const int q = lane / sharers / K, c = lane / sharers % K;
        if (lane % sharers == 0 && q <= last) s.unknown(first + q)[c * BLOCK] -= sum;
    }
}

// b -= L^T x in all rows above, by the unknowns of block `solved`: one thread a row of L^T.
template <int K, class T>
__device__ __forceinline__ void apply_to_rows_above(Shared<K, T> s, const T* lower, int rows,
                                                    int solved, int m, int number, int threads) {
    const int first = solved * BLOCK, count = min(BLOCK, m - first);
    for (int i = number; i < rows; i += threads) {
        const T* const column = lower + Index(first) * m + i;
        const T* const x = s.unknown(first);
        T* const mine = s.unknown(i);
        T sums[K] = {};
#pragma unroll(K == 8 ? 1 : 8 / K)
        for (int q = 0; q < count; ++q) {
            const T value = column[Index(q) * m];
#pragma unroll
            for (int c = 0; c < K; ++c) sums[c] += value * x[c * BLOCK + q];
        }
#pragma unroll
        for (int c = 0; c < K; ++c) mine[c * BLOCK] -= sums[c];
    }
}

// In shared memory: x <- L^-1 x, or L^-T x; what lies above L's diagonal is not used. All threads
// come with their part of x written, and find all of it at the end; barriers are in here.
template <int K, bool TRANSPOSE, class T>
__device__ __forceinline__ void solve_staged(Shared<K, T> s, const T* lower, int m) {
    const int blocks = (m + BLOCK - 1) / BLOCK, helpers = blockDim.x - 32;
    const int number = int(threadIdx.x) - 32;  // of a thread that helps warp 0
    if (blocks == 0) return;
    const int first = TRANSPOSE ? (blocks - 1) * BLOCK : 0;
    load_tile(s.diagonal(0), lower, first, first, m, threadIdx.x / 32, blockDim.x / 32);
    __syncthreads();
    for (int step = 0; step < blocks; ++step) {
        const int block = TRANSPOSE ? blocks - 1 - step : step;
        const int before = TRANSPOSE ? block + 1 : block - 1, after = 2 * block - before;
        if (number < 0) {
            solve_block<K, TRANSPOSE>(s, block, before, step, threadIdx.x);
        } else if (step + 1 < blocks) {
            load_tile(s.diagonal(step + 1), lower, after * BLOCK, after * BLOCK, m, number / 32,
                      helpers / 32);
            load_tile(s.neighbour(step + 1), lower, max(block, after) * BLOCK,
                      min(block, after) * BLOCK, m, number / 32, helpers / 32);
            if (step > 0 && TRANSPOSE)
                apply_to_rows_above(s, lower, block * BLOCK, before, m, number, helpers);
            if (step > 0 && !TRANSPOSE)
                apply_to_block(s, lower, after, block, m, number / 32, helpers / 32);
        }
        __syncthreads();
    }
}

// Rows by number, or by an index where there is one, -1 for none: to the blocked layout of
// `Shared`, with zeros in all that is padding, or from there.
template <int K, class T>
__device__ __forceinline__ void load_rows(T* to, const T* from, const Index* index, int rows,
                                          int k) {
#pragma unroll 1
    for (int e = threadIdx.x; e < K * BLOCK * ((rows + BLOCK - 1) / BLOCK); e += blockDim.x) {
        const int i = e / K, c = e % K;
        const Index row = i < rows && c < k ? (index ? index[i] : i) : -1;
        unknown<K>(to, i)[c * BLOCK] = row < 0 ? T(0) : from[row * k + c];
    }
}
template <int K, class T>
__device__ __forceinline__ void store_rows(T* to, T* from, const Index* index, int rows, int k) {
#pragma unroll 1
    for (int e = threadIdx.x; e < rows * k; e += blockDim.x) {
        const int i = e / k, c = e % k;
        const Index row = index ? index[i] : i;
        if (row >= 0) to[row * k + c] = unknown<K>(from, i)[c * BLOCK];
    }
}

#endif
