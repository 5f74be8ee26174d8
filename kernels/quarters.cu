// A stack of blocks (nodes, m, m) cut after r rows and columns, and stacks put together of such.
//
//   quartered   b[t, i, j] = blocks[t, o(i), o(j)], and added[t, i] more where i = j:
//               upper (nodes, r, r), lower (nodes, m - r, r), across (nodes, r, m - r),
//               own (nodes, m - r, m - r); o(i) = order[t, i], or i without an order; without
//               `added` nothing is added
//   paired      [[d[2 p], b[p]], [b[p]^T, d[2 p + 1]]]: d (2 pairs, r, r), b (pairs, r, r),
//               out (pairs, 2 r, 2 r)
//
// Launch: 256 threads, a number of the result each, `count` in all. No shared memory. Bound by
// bandwidth: all is read and written once; rows are read in the order of their columns.
#include "common.cuh"

template <class T>
__device__ void quartered(const T* blocks, const Index* order, const T* added, T* upper, T* lower,
                          T* across, T* own, int m, int r, Index count) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const int j = int(item % m), i = int(item / m % m), rest = m - r;
    const Index node = item / m / m, row = order ? order[node * m + i] : i;
    T value = blocks[(node * m + row) * m + (order ? order[node * m + j] : j)];
    if (added && i == j) value += added[node * m + i];
    if (i < r && j < r)
        upper[(node * r + i) * r + j] = value;
    else if (j < r)
        lower[(node * rest + i - r) * r + j] = value;
    else if (i < r)
        across[(node * r + i) * rest + j - r] = value;
    else
        own[(node * rest + i - r) * rest + j - r] = value;
}

template <class T>
__device__ void paired(const T* d, const T* b, T* out, int r, Index count) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const int width = 2 * r, j = int(item % width), i = int(item / width % width);
    const Index pair = item / width / width;
    const int row = i < r ? i : i - r, column = j < r ? j : j - r;
    if ((i < r) == (j < r))
        out[item] = d[((2 * pair + (i < r ? 0 : 1)) * r + row) * r + column];
    else
        out[item] = b[(pair * r + (i < r ? row : column)) * r + (i < r ? column : row)];
}

#define QUARTERS(suffix, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(256) quartered_##suffix(                         \
        const T* blocks, const long long* order, const T* added, T* upper, T* lower, T* across,   \
        T* own, int m, int r, long long count) {                                                  \
        quartered<T>(blocks, order, added, upper, lower, across, own, m, r, count);               \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) paired_##suffix(                            \
        const T* d, const T* b, T* out, int r, long long count) {                                 \
        paired<T>(d, b, out, r, count);                                                           \
    }
QUARTERS(f32, float)
QUARTERS(f64, double)
