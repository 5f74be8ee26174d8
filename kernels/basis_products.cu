// Narrow products (k <= 8 columns) of the telescoping form, U = P [I; T]; see gpu_hodlr.telescope.
//
//   restrict_rows   U^T x: w[t, j] = x[t, order[t, j]] + sum_i T[t, i, j] x[t, order[t, r + i]]
//   prolong_rows    U z: y[t, order[t, j]] = z[t, j],
//                        y[t, order[t, r + i]] = sum_j T[t, i, j] z[t, j]
//   couple          z[2 p] = B[p] w[2 p + 1], z[2 p + 1] = B[p]^T w[2 p]
//   block_diagonal  y[t] = D[t] x[index[t]], 0 for x where index is -1
//   prolong_rows and couple add to y and z if `add` is not 0.
//
//   basis T (nodes, rows - r, r);  order (nodes, rows), or null for the identity
//   x, y (nodes, rows, k), w, z (nodes, r, k);  couple: w, z (2 pairs, r, k), B (pairs, r, r)
//   block_diagonal: D (nodes, m, m), x (n, k), index (nodes, m), y (nodes, m, k)
//
// Launch: restrict_rows_f32_K, ..., K = 1, 2, 4 or 8 the least that holds k; blocks of (bx, by)
// threads, bx = 8, 16 or 32, bx by = 32, 64, ... or 256; narrower bx and fewer threads make more
// blocks of a node, for levels with few. Shared memory: 2080 sizeof(T) bytes.
// With strips(n) = ceil(n / (4 bx by / 32)), the 4 being 2 where k > 2, the grid has
//   restrict_rows nodes ceil(r / bx);           prolong_rows nodes max(1, strips(rows - r));
//   couple pairs (strips(r) + ceil(r / bx));    block_diagonal nodes strips(m) blocks.
//
// All four are bound by the bytes of T, B, D, read once, by whole transactions: a block has all
// rows of bx columns, or all columns of a strip of rows, so that no sum leaves it. Only B is wanted
// by two blocks, one a direction; neighbours in the grid, so that the second read hits L2.
#include "common.cuh"

constexpr int DEPTH = 2048;  // values of the right-hand side staged at a time

// Rows of a matrix with k columns, picked by an index where there is one.
template <class T>
struct Rows {
    T* first;  // null: all 0
    const Index* index;
    int k;

    __device__ __forceinline__ T* row(int i) const {
        return first + (index ? index[i] : Index(i)) * k;
    }
    __device__ __forceinline__ T value(int i, int c) const {
        return first && c < k && (!index || index[i] >= 0) ? row(i)[c] : T(0);
    }
};

template <int K, class T>
__device__ __forceinline__ void stage(T* staged, Rows<const T> v, int first, int count,
                                      int row_step, int column_step) {
#pragma unroll(K == 8 ? 1 : 2)
    for (int e = thread_number(); e < count * K; e += blockDim.x * blockDim.y)
        staged[e / K * row_step + e % K * column_step] = v.value(first + e / K, e % K);
}

// out = base + A^T v of the tile's columns; A (rows, columns).
template <int K, class T>
__device__ __forceinline__ void column_products(const T* a, int rows, int columns,
                                                Rows<const T> v, Rows<const T> base, Rows<T> out,
                                                int tile, T* staged) {
    const int first_column = tile * blockDim.x;
    const T* const column = a + min(first_column + int(threadIdx.x), columns - 1);
    T sums[K] = {};
    for (int first = 0; first < rows; first += DEPTH / K) {
        const int count = min(DEPTH / K, rows - first);
        stage<K>(staged, v, first, count, K, 1);  // by rows: all lanes read the same
        __syncthreads();
#pragma unroll(K == 8 ? 2 : 4)
        for (int i = threadIdx.y; i < count; i += blockDim.y) {
            const T value = column[Index(first + i) * columns];
#pragma unroll
            for (int c = 0; c < K; ++c) sums[c] += value * staged[i * K + c];
        }
        __syncthreads();
    }
    const int number = thread_number(), width = blockDim.x * K;
#pragma unroll
    for (int c = 0; c < K; ++c) staged[number * K + c] = sums[c];
    __syncthreads();
    for (int e = number; e < width; e += blockDim.x * blockDim.y) {
        const int j = first_column + e / K, c = e % K;
        if (j >= columns || c >= out.k) continue;
        T sum = 0;
#pragma unroll 1
        for (int y = 0; y < blockDim.y; ++y) sum += staged[y * width + e];
        out.row(j)[c] = base.value(j, c) + sum;
    }
}

// Rows a warp takes at a time: the right-hand side is read from shared memory once for all.
template <int K>
constexpr int ROWS = K > 2 ? 2 : 4;

template <int K>
__device__ __forceinline__ int num_strips(int rows) {
    const int strip = blockDim.x * blockDim.y / 32 * ROWS<K>;
    return (rows + strip - 1) / strip;
}

// out = base + A v of the strip's rows; A (rows, columns).
template <int K, class T>
__device__ __forceinline__ void row_products(const T* a, int rows, int columns, Rows<const T> v,
                                             Rows<const T> base, Rows<T> out, int strip,
                                             T* staged) {
    constexpr int pitch = DEPTH / K + 32 / K;  // K rows of it, apart by banks
    constexpr int sharers = 32 / (ROWS<K> * K);
    const int number = thread_number(), lane = number % 32;
    const int first_row = (strip * int(blockDim.x * blockDim.y / 32) + number / 32) * ROWS<K>;
    const int last = rows - 1 - first_row;  // a row past the end is the last one again
    T sums[ROWS<K> * K] = {};
    for (int first = 0; first < columns; first += DEPTH / K) {
        const int count = min(DEPTH / K, columns - first);
        stage<K>(staged, v, first, count, 1, pitch);  // by columns: lanes read neighbours
        __syncthreads();
        if (last >= 0) {
            const T* const corner = a + Index(first_row) * columns + first;
#pragma unroll(K == 8 ? 1 : 2)
            for (int j = lane; j < count; j += 32) {
                T values[ROWS<K>];
#pragma unroll
                for (int q = 0; q < ROWS<K>; ++q)
                    values[q] = corner[min(q, last) * columns + j];
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
    const T sum = warp_sums<ROWS<K> * K>(sums);
    const int row = first_row + lane / sharers / K, c = lane / sharers % K;
    if (lane % sharers == 0 && row < rows && c < out.k)
        out.row(row)[c] = base.value(row, c) + sum;
}

template <int K, class T>
__device__ void restrict_rows(const T* basis, const T* x, const Index* order, T* w, int rows,
                              int r, int k) {
    DYN_SHARED(shared);
    const int tiles = (r + blockDim.x - 1) / blockDim.x, tile = blockIdx.x % tiles;
    const Index node = blockIdx.x / tiles;
    const Index* const mine = order ? order + node * rows : nullptr;
    x += node * rows * k;
    const Rows<const T> skeleton = {x, mine, k};
    const Rows<const T> rest = {mine ? x : x + Index(r) * k, mine ? mine + r : nullptr, k};
    column_products<K>(basis + node * (rows - r) * r, rows - r, r, rest, skeleton,
                       Rows<T>{w + node * r * k, nullptr, k}, tile, take<T>(shared, DEPTH));
}

template <int K, class T>
__device__ void prolong_rows(const T* basis, const T* z, const Index* order, T* y, int rows,
                             int r, int k, int add) {
    DYN_SHARED(shared);
    const int strips = max(1, num_strips<K>(rows - r)), strip = blockIdx.x % strips;
    const Index node = blockIdx.x / strips;
    const Index* const mine = order ? order + node * rows : nullptr;
    y += node * rows * k;
    z += node * r * k;
    const Rows<T> rest = {mine ? y : y + Index(r) * k, mine ? mine + r : nullptr, k};
    row_products<K>(basis + node * (rows - r) * r, rows - r, r, Rows<const T>{z, nullptr, k},
                    Rows<const T>{add ? rest.first : nullptr, rest.index, k}, rest, strip,
                    take<T>(shared, DEPTH + 32));
    const int threads = blockDim.x * blockDim.y;
#pragma unroll 1
    for (int e = strip * threads + thread_number(); e < r * k; e += strips * threads) {
        T* const to = Rows<T>{y, mine, k}.row(e / k) + e % k;
        *to = add ? *to + z[e] : z[e];
    }
}

template <int K, class T>
__device__ void couple(const T* b, const T* w, T* z, int r, int k, int add) {
    DYN_SHARED(shared);
    T* const staged = take<T>(shared, DEPTH + 32);
    const int tiles = (r + blockDim.x - 1) / blockDim.x, strips = num_strips<K>(r);
    const Index pair = blockIdx.x / (tiles + strips), size = Index(r) * k;
    const int number = blockIdx.x % (tiles + strips);
    const bool left = number >= tiles;  // z[2 p], by rows of B
    const Rows<const T> from = {w + (2 * pair + left) * size, nullptr, k};
    const Rows<T> to = {z + (2 * pair + !left) * size, nullptr, k};
    const Rows<const T> base = {add ? to.first : nullptr, nullptr, k};
    b += pair * r * r;
    if (left) row_products<K>(b, r, r, from, base, to, number - tiles, staged);
    else column_products<K>(b, r, r, from, base, to, number, staged);
}

template <int K, class T>
__device__ void block_diagonal(const T* d, const T* x, const Index* index, T* y, int m, int k) {
    DYN_SHARED(shared);
    const int strips = num_strips<K>(m);
    const Index node = blockIdx.x / strips;
    row_products<K>(d + node * m * m, m, m, Rows<const T>{x, index + node * m, k},
                    Rows<const T>{nullptr, nullptr, k}, Rows<T>{y + node * m * k, nullptr, k},
                    blockIdx.x % strips, take<T>(shared, DEPTH + 32));
}

#define BASIS_PRODUCTS(suffix, T, K)                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) restrict_rows_##suffix##_##K(           \
        const T* basis, const T* x, const long long* order, T* w, int rows, int r, int k) {      \
        restrict_rows<K, T>(basis, x, order, w, rows, r, k);                                     \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4) prolong_rows_##suffix##_##K(            \
        const T* basis, const T* z, const long long* order, T* y, int rows, int r, int k,        \
        int add) {                                                                               \
        prolong_rows<K, T>(basis, z, order, y, rows, r, k, add);                                 \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4)                                         \
        couple_##suffix##_##K(const T* b, const T* w, T* z, int r, int k, int add) {             \
        couple<K, T>(b, w, z, r, k, add);                                                        \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4) block_diagonal_##suffix##_##K(          \
        const T* d, const T* x, const long long* index, T* y, int m, int k) {                    \
        block_diagonal<K, T>(d, x, index, y, m, k);                                              \
    }
BASIS_PRODUCTS(f32, float, 1)
BASIS_PRODUCTS(f32, float, 2)
BASIS_PRODUCTS(f32, float, 4)
BASIS_PRODUCTS(f32, float, 8)
BASIS_PRODUCTS(f64, double, 1)
BASIS_PRODUCTS(f64, double, 2)
BASIS_PRODUCTS(f64, double, 4)
BASIS_PRODUCTS(f64, double, 8)
