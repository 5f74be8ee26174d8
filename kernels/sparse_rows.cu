// A sparse matrix by rows times a dense one: y[i, c] = sum over e of values[e] x[columns[e], c],
// e from starts[i] to starts[i + 1] - 1.
//
//   sparse_rows_narrow   k <= 8: the lanes of a row's warp share its entries
//   sparse_rows_wide     any k: each lane of a row's warp has a column of y; a warp for 32 columns
//
//   starts (rows + 1,) int64, columns int32, values, x (n, k), y (rows, k)
//
// Launch: blocks of (32, w) threads, w <= 8, one warp a row, ceil(rows / w) blocks in x; wide:
// ceil(k / 32) in y. No shared memory. Bound by bandwidth: an entry is read once by narrow, and once
// for 32 columns by wide; rows of x are read where the columns say. Sums have a fixed order.
#include "common.cuh"

template <class T>
__device__ void sparse_rows_narrow(const Index* starts, const int* columns, const T* values,
                                   const T* x, T* y, Index rows, int k) {
    constexpr int most = 8;
    const Index row = Index(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // the whole warp
    T sums[most] = {};
    for (Index e = starts[row] + threadIdx.x; e < starts[row + 1]; e += 32) {
        const T value = values[e];
        const T* const from = x + Index(columns[e]) * k;
#pragma unroll
        for (int c = 0; c < most; ++c)
            if (c < k) sums[c] += value * from[c];
    }
    const T sum = warp_sums<most>(sums);
    const int c = threadIdx.x / (32 / most);
    if (threadIdx.x % (32 / most) == 0 && c < k) y[row * k + c] = sum;
}

template <class T>
__device__ void sparse_rows_wide(const Index* starts, const int* columns, const T* values,
                                 const T* x, T* y, Index rows, int k) {
    const Index row = Index(blockIdx.x) * blockDim.y + threadIdx.y;
    const int c = blockIdx.y * 32 + threadIdx.x;
    if (row >= rows || c >= k) return;
    T sum = 0;
    for (Index e = starts[row]; e < starts[row + 1]; ++e)
        sum += values[e] * x[Index(columns[e]) * k + c];
    y[row * k + c] = sum;
}

#define SPARSE_ROWS(suffix, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(256) sparse_rows_narrow_##suffix(              \
        const long long* starts, const int* columns, const T* values, const T* x, T* y,         \
        long long rows, int k) {                                                                \
        sparse_rows_narrow<T>(starts, columns, values, x, y, rows, k);                          \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) sparse_rows_wide_##suffix(                \
        const long long* starts, const int* columns, const T* values, const T* x, T* y,         \
        long long rows, int k) {                                                                \
        sparse_rows_wide<T>(starts, columns, values, x, y, rows, k);                            \
    }
SPARSE_ROWS(f32, float)
SPARSE_ROWS(f64, double)
