// Products of a matrix with up to K = 8 columns in shared memory, by one thread block;
// gpu_hodlr.kernel_sources inlines it, after triangular_solves.cuh, whose layout the columns have.
#ifndef GPU_HODLR_SHARED_PRODUCTS_CUH
#define GPU_HODLR_SHARED_PRODUCTS_CUH

// b -= A x, for A (rows, columns): one warp takes a few rows, its lanes walk them. The loop is that of
// `apply_to_block`: of one piece for both, solve_lower spills registers.
template <int K, class T>
__device__ __forceinline__ void subtract_rows(T* b, const T* a, int rows, int columns, T* x) {
    constexpr int together = K > 2 ? 2 : 4;
    constexpr int sharers = 32 / (together * K);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int first = warp * together; first < rows; first += warps * together) {
        const int last = rows - 1 - first;  // a row past the end is the last one again
        const T* const corner = a + Index(first) * columns;
        T sums[together * K] = {};
#pragma unroll(K == 8 ? 1 : 2)
        for (int j = lane; j < columns; j += 32) {
            T values[together];
#pragma unroll
            for (int q = 0; q < together; ++q)
                values[q] = corner[Index(min(q, last)) * columns + j];
            const T* const column = unknown<K>(x, j);
#pragma unroll
            for (int c = 0; c < K; ++c) {
                const T value = column[c * BLOCK];
#pragma unroll
                for (int q = 0; q < together; ++q) sums[q * K + c] += values[q] * value;
            }
        }
        const T sum = warp_sums<together * K>(sums);
        const int q = lane / sharers / K, c = lane / sharers % K;
        if (lane % sharers == 0 && q <= last) unknown<K>(b, first + q)[c * BLOCK] -= sum;
    }
}

// b -= A^T x, for A (rows, columns): a warp takes 32 columns, and where there are more warps some
// of the rows; `partial` holds 32 K values a warp.
template <int K, class T>
__device__ __forceinline__ void subtract_columns(T* b, const T* a, int rows, int columns, T* x,
                                                 T* partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int tiles = (columns + 31) / 32, abreast = max(1, min(tiles, warps));
    const int groups = warps / abreast, group = warp / abreast;
    for (int tile = warp % abreast; tile < tiles && group < groups; tile += abreast) {
        const T* const column = a + min(tile * 32 + lane, columns - 1);
        T sums[K] = {};
#pragma unroll(K == 8 ? 1 : 4)
        for (int i = group; i < rows; i += groups) {
            const T value = column[Index(i) * columns];
            const T* const row = unknown<K>(x, i);
#pragma unroll
            for (int c = 0; c < K; ++c) sums[c] += value * row[c * BLOCK];
        }
        T* const to = groups > 1 ? partial + (group * tiles + tile) * (32 * K) + lane
                                 : unknown<K>(b, tile * 32 + lane);
#pragma unroll
        for (int c = 0; c < K; ++c) {
            if (groups > 1) to[c * BLOCK] = sums[c];
            else to[c * BLOCK] -= sums[c];  // past the columns: padding
        }
    }
    __syncthreads();
    if (groups == 1) return;
    for (int e = threadIdx.x; e < tiles * (32 * K); e += blockDim.x) {
        T sum = 0;
#pragma unroll 1
        for (int g = 0; g < groups; ++g) sum += partial[g * tiles * (32 * K) + e];
        b[e] -= sum;
    }
    __syncthreads();
}

#endif
