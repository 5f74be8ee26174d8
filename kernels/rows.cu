// Rows moved by an index array: the permuted, padded right-hand sides of a level.
//
//   gather_rows     out[t, i] = x[index[t, i]], or 0 where index is -1
//                   x (n, k), index (nodes, m) with count = nodes m, out (nodes, m, k)
//   scatter_rows    out[index[t, i]] = blocks[t, i], nothing where index is -1; no index twice.
//                   blocks (nodes, m, k), out (n, k): the caller clears it before
//   permute_rows    out[t, i] = x[t, order[t, i]]: x (nodes, m, k), order (nodes, p), count =
//                   nodes p, out (nodes, p, k)
//   unpermute_rows  out[t, order[t, i]] = x[t, i]: all (nodes, m, k), order (nodes, m)
//   scaled_panels   out[g, j] = x[f] y[row_of[slot[g], slots[t, j]]], entry by entry, t = node[g]
//                   and f = feature[t, j], or 0 where f or that of row_of is -1
//                   x (n, k), y (p, k), node and slot (groups,), feature and slots (nodes, columns),
//                   row_of (s, s), out (groups, columns, k) with count = groups columns
//
// Launch: blocks (bx, by), bx by <= 256, bx about k, on any grid: threads in x and the grid in y walk
// along a row, threads in y and the grid in x from row to row. Few long rows want blocks in y, or
// most of the GPU is idle. No shared memory. Bound by bandwidth.
#include "common.cuh"

__device__ __forceinline__ Index first_row() {
    return Index(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ Index row_stride() {
    return Index(gridDim.x) * blockDim.y;
}

__device__ __forceinline__ int first_column() {
    return blockIdx.y * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int column_stride() {
    return gridDim.y * blockDim.x;
}

template <class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int k) {
    for (int c = first_column(); c < k; c += column_stride()) to[c] = from[c];
}

template <class T>
__device__ void gather_rows(const T* x, const Index* index, T* out, Index count, int k) {
    for (Index row = first_row(); row < count; row += row_stride()) {
        if (index[row] >= 0)
            copy_row(out + row * k, x + index[row] * k, k);
        else
            for (int c = first_column(); c < k; c += column_stride()) out[row * k + c] = 0;
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
__device__ void scaled_panels(const T* x, const T* y, const Index* node, const Index* slot,
                              const Index* feature, const Index* slots, const Index* row_of, T* out,
                              Index count, int columns, int s, int k) {
    for (Index row = first_row(); row < count; row += row_stride()) {
        const Index group = row / columns, place = node[group] * columns + row % columns;
        const Index f = feature[place], by = row_of[slot[group] * s + slots[place]];
        const bool there = f >= 0 && by >= 0;
        const T* const from = x + (there ? f : 0) * k;
        const T* const scale = y + (there ? by : 0) * k;
        for (int c = first_column(); c < k; c += column_stride())
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
    extern "C" __global__ void __launch_bounds__(256) scaled_panels_##suffix(                    \
        const T* x, const T* y, const long long* node, const long long* slot,                    \
        const long long* feature, const long long* slots, const long long* row_of, T* out,       \
        long long count, int columns, int s, int k) {                                            \
        scaled_panels<T>(x, y, node, slot, feature, slots, row_of, out, count, columns, s, k);   \
    }
ROWS(f32, float)
ROWS(f64, double)
