// Products of a matrix with up to K = 8 columns, for part of its rows by one thread block;
// gpu_hodlr.kernel_sources inlines it, after common.cuh.
//
// Blocks of (bx, by) threads, whole warps. Each matrix entry is read once, by whole transactions: a
// block has all rows of bx columns, or all columns of a strip of rows, so that no sum leaves it.
// Either way sums may go on over several matrices before they are finished.
#ifndef GPU_HODLR_NARROW_PRODUCTS_CUH
#define GPU_HODLR_NARROW_PRODUCTS_CUH

constexpr int DEPTH = 2048;  // values of the right-hand side staged at a time

typedef unsigned short Bfloat16;  // the upper half of a float's bits

// A stored matrix entry in the type of the sums.
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(Bfloat16 x) {
    return __uint_as_float(static_cast<unsigned int>(x) << 16);
}

// Rows of a matrix with k columns, picked by an index where there is one, -1 for zeros.
template <class T>
struct Rows {
    T* first;  // null: all 0
    const Index* index;
    int k;

    __device__ __forceinline__ T* row(int i) const {
        return first + (index ? index[i] : Index(i)) * k;
    }
    __device__ __forceinline__ bool is_real(int i) const { return !index || index[i] >= 0; }
    __device__ __forceinline__ T value(int i, int c) const {
        return first && c < k && is_real(i) ? row(i)[c] : T(0);
    }
};

template <int K, class T>
__device__ __forceinline__ void stage(T* staged, Rows<const T> v, int first, int count,
                                      int row_step, int column_step) {
#pragma unroll(K == 8 ? 1 : 2)
    for (int e = thread_number(); e < count * K; e += blockDim.x * blockDim.y)
        staged[e / K * row_step + e % K * column_step] = v.value(first + e / K, e % K);
}

// Adds the thread's part of A^T v of the tile's columns to its K sums; A (rows, columns).
template <int K, class S, class T>
__device__ __forceinline__ void add_columns(T* sums, const S* a, int rows, int columns,
                                            Rows<const T> v, int tile, T* staged) {
    const S* const column = a + min(tile * int(blockDim.x) + int(threadIdx.x), columns - 1);
    for (int first = 0; first < rows; first += DEPTH / K) {
        const int count = min(DEPTH / K, rows - first);
        stage<K>(staged, v, first, count, K, 1);  // by rows: all lanes read the same
        __syncthreads();
#pragma unroll(K == 8 ? 2 : 4)
        for (int i = threadIdx.y; i < count; i += blockDim.y) {
            const T value = widened(column[Index(first + i) * columns]);
#pragma unroll
            for (int c = 0; c < K; ++c) sums[c] += value * staged[i * K + c];
        }
        __syncthreads();
    }
}

// out = base + the sums of `add_columns`. A barrier must come before `staged` is used again.
template <int K, class T>
__device__ __forceinline__ void finish_columns(const T* sums, int columns, Rows<const T> base,
                                               Rows<T> out, int tile, T* staged) {
    const int number = thread_number(), width = blockDim.x * K;
#pragma unroll
    for (int c = 0; c < K; ++c) staged[number * K + c] = sums[c];
    __syncthreads();
    for (int e = number; e < width; e += blockDim.x * blockDim.y) {
        const int j = tile * blockDim.x + e / K, c = e % K;
        if (j >= columns || c >= out.k) continue;
        T sum = 0;
#pragma unroll 1
        for (int y = 0; y < blockDim.y; ++y) sum += staged[y * width + e];
        out.row(j)[c] = base.value(j, c) + sum;
    }
}

// out = base + A^T v of the tile's columns.
template <int K, class S, class T>
__device__ __forceinline__ void column_products(const S* a, int rows, int columns,
                                                Rows<const T> v, Rows<const T> base, Rows<T> out,
                                                int tile, T* staged) {
    T sums[K] = {};
    add_columns<K>(sums, a, rows, columns, v, tile, staged);
    finish_columns<K>(sums, columns, base, out, tile, staged);
}

// Rows a warp takes at a time: the right-hand side is read from shared memory once for all.
template <int K>
constexpr int ROWS = K > 2 ? 2 : 4;

template <int K>
__device__ __forceinline__ int num_strips(int rows) {
    const int strip = blockDim.x * blockDim.y / 32 * ROWS<K>;
    return (rows + strip - 1) / strip;
}

// The first row of a strip that the thread's warp takes.
template <int K>
__device__ __forceinline__ int first_row_of_warp(int strip) {
    return (strip * int(blockDim.x * blockDim.y / 32) + thread_number() / 32) * ROWS<K>;
}

// Adds the lane's part of A v of its warp's rows to its ROWS K sums; A (rows, columns).
template <int K, class S, class T>
__device__ __forceinline__ void add_rows(T* sums, const S* a, int rows, int columns,
                                         Rows<const T> v, int strip, T* staged) {
    constexpr int pitch = DEPTH / K + 32 / K;  // K rows of it, apart by banks
    const int lane = thread_number() % 32, first_row = first_row_of_warp<K>(strip);
    const int last = rows - 1 - first_row;  // a row past the end is the last one again
    for (int first = 0; first < columns; first += DEPTH / K) {
        const int count = min(DEPTH / K, columns - first);
        stage<K>(staged, v, first, count, 1, pitch);  // by columns: lanes read neighbours
        __syncthreads();
        if (last >= 0) {
            const S* const corner = a + Index(first_row) * columns + first;
#pragma unroll(K == 8 ? 1 : 2)
            for (int j = lane; j < count; j += 32) {
                T values[ROWS<K>];
#pragma unroll
                for (int q = 0; q < ROWS<K>; ++q)
                    values[q] = widened(corner[min(q, last) * columns + j]);
#pragma unroll
                for (int c = 0; c < K; ++c) {
                    const T x = staged[c * pitch + j];
#pragma unroll
                    for (int q = 0; q < ROWS<K>; ++q) sums[q * K + c] += values[q] * x;
                }
            }
        }
        __syncthreads();
    }
}

// out = base + the sums of `add_rows`, which are overwritten.
template <int K, class T>
__device__ __forceinline__ void finish_rows(T* sums, int rows, Rows<const T> base, Rows<T> out,
                                            int strip) {
    constexpr int sharers = 32 / (ROWS<K> * K);
    const int lane = thread_number() % 32;
    const T sum = warp_sums<ROWS<K> * K>(sums);
    const int row = first_row_of_warp<K>(strip) + lane / sharers / K, c = lane / sharers % K;
    if (lane % sharers == 0 && row < rows && c < out.k && out.is_real(row))
        out.row(row)[c] = base.value(row, c) + sum;
}

// out = base + A v of the strip's rows.
template <int K, class S, class T>
__device__ __forceinline__ void row_products(const S* a, int rows, int columns, Rows<const T> v,
                                             Rows<const T> base, Rows<T> out, int strip,
                                             T* staged) {
    T sums[ROWS<K> * K] = {};
    add_rows<K>(sums, a, rows, columns, v, strip, staged);
    finish_rows<K>(sums, rows, base, out, strip);
}

#endif
