// Rows moved by an index array: the permuted, padded right-hand sides of a level.
//
//   gather_rows     out[t, i] = x[index[t, i]], or 0 where index is -1
//                   x (n, k), index (nodes, m) with count = nodes m, out (nodes, m, k)
//   scatter_rows    out[index[t, i]] = blocks[t, i], nothing where index is -1; no index twice.
//                   blocks (nodes, m, k), out (n, k): the caller clears it before
//   permute_rows    out[t, i] = x[t, order[t, i]]: x (nodes, m, k), order (nodes, p), count =
//                   nodes p, out (nodes, p, k)
//   unpermute_rows  out[t, order[t, i]] = x[t, i]: all (nodes, m, k), order (nodes, m)
//   scaled_rows     out[i] = x[index[i]] y[by[i]], entry by entry, or 0 where either is -1
//                   x (n, k), y (p, k), index and by (count,), out (count, k)
//
// Launch: blocks (bx, by), bx by <= 256, bx about k: threads in x walk a row, threads in y and
// the grid (any number of blocks in x) walk the rows. No shared memory. Bound by bandwidth.
#include "common.cuh"

__device__ __forceinline__ Index first_row() {
    return Index(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ Index row_stride() {
    return Index(gridDim.x) * blockDim.y;
}

template <class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int k) {
    for (int c = threadIdx.x; c < k; c += blockDim.x) to[c] = from[c];
}

template <class T>
__device__ void gather_rows(const T* x, const Index* index, T* out, Index count, int k) {
    for (Index row = first_row(); row < count; row += row_stride()) {
        if (index[row] >= 0)
            copy_row(out + row * k, x + index[row] * k, k);
        else
            for (int c = threadIdx.x; c < k; c += blockDim.x) out[row * k + c] = 0;
    }
}

template <class T>
__device__ void scatter_rows(const T* blocks, const Index* index, T* out, Index count, int k) {
    for (Index row = first_row(); row < count; row += row_stride())
        if (index[row] >= 0) copy_row(out + index[row] * k, blocks + row * k, k);
}

template <class T>
__device__ void permute_rows(const T* x, const Index* order, T* out, Index count, int m, int p,
                             int k) {
    for (Index row = first_row(); row < count; row += row_stride())
        copy_row(out + row * k, x + (row / p * m + order[row]) * k, k);
}

template <class T>
__device__ void unpermute_rows(const T* x, const Index* order, T* out, Index count, int m,
                               int k) {
    for (Index row = first_row(); row < count; row += row_stride())
        copy_row(out + (row / m * m + order[row]) * k, x + row * k, k);
}

template <class T>
__device__ void scaled_rows(const T* x, const Index* index, const T* y, const Index* by, T* out,
                            Index count, int k) {
    for (Index row = first_row(); row < count; row += row_stride()) {
        const bool there = index[row] >= 0 && by[row] >= 0;
        const T* const from = x + (there ? index[row] : 0) * k;
        const T* const scale = y + (there ? by[row] : 0) * k;
        for (int c = threadIdx.x; c < k; c += blockDim.x)
            out[row * k + c] = there ? from[c] * scale[c] : T(0);
    }
}

#define ROWS(suffix, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) gather_rows_##suffix(                      \
        const T* x, const long long* index, T* out, long long count, int k) {                    \
        gather_rows<T>(x, index, out, count, k);                                                 \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) scatter_rows_##suffix(                     \
        const T* blocks, const long long* index, T* out, long long count, int k) {               \
        scatter_rows<T>(blocks, index, out, count, k);                                           \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) permute_rows_##suffix(                     \
        const T* x, const long long* order, T* out, long long count, int m, int p, int k) {      \
        permute_rows<T>(x, order, out, count, m, p, k);                                          \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) unpermute_rows_##suffix(                   \
        const T* x, const long long* order, T* out, long long count, int m, int k) {             \
        unpermute_rows<T>(x, order, out, count, m, k);                                           \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) scaled_rows_##suffix(                      \
        const T* x, const long long* index, const T* y, const long long* by, T* out,             \
        long long count, int k) {                                                                \
        scaled_rows<T>(x, index, y, by, out, count, k);                                          \
    }
ROWS(f32, float)
ROWS(f64, double)
