// Narrow products (k <= 8 columns) of the telescoping form, U = P [I; T]; see gpu_hodlr.telescope.
//
//   restrict_rows   U^T x: w[t, j] = x[t, order[t, j]] + sum_i T[t, i, j] x[t, order[t, r + i]]
//   prolong_rows    U z: y[t, order[t, j]] = z[t, j],
//                        y[t, order[t, r + i]] = sum_j T[t, i, j] z[t, j]
//   couple          z[2 p] = B[p] w[2 p + 1], z[2 p + 1] = B[p]^T w[2 p]
//   block_diagonal  y[t] = D[t] x[index[t]], or y[index[t]] if `scattered` is not 0
//   prolong_rows and couple add to y and z if `add` is not 0. Where an index is -1, x is 0 and y is
//   not written.
//
//   basis T (nodes, rows - r, r);  order (nodes, rows), or null for the identity
//   x, y (nodes, rows, k), w, z (nodes, r, k);  couple: w, z (2 pairs, r, k), B (pairs, r, r)
//   of restrict_rows and prolong_rows x and y begin `step` rows apart: `rows`, or 0 where they are
//   (n, k) and the order numbers all of their rows: of the leaves, whose rows are nowhere else
//   block_diagonal: D (nodes, m, m), x (n, k), index (nodes, m), y (nodes, m, k), scattered (n, k)
//
// Types: f32, f64, and bf16, in which basis and B are bfloat16 and all else is float; of
// block_diagonal f32 and f64.
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
#include "narrow_products.cuh"

template <int K, class S, class T>
__device__ void restrict_rows(const S* basis, const T* x, const Index* order, T* w, int rows,
                              int r, int k, int step) {
    DYN_SHARED(shared);
    const int tiles = (r + blockDim.x - 1) / blockDim.x, tile = blockIdx.x % tiles;
    const Index node = blockIdx.x / tiles;
    const Index* const mine = order ? order + node * rows : nullptr;
    x += node * step * k;
    const Rows<const T> skeleton = {x, mine, k};
    const Rows<const T> rest = {mine ? x : x + Index(r) * k, mine ? mine + r : nullptr, k};
    column_products<K>(basis + node * (rows - r) * r, rows - r, r, rest, skeleton,
                       Rows<T>{w + node * r * k, nullptr, k}, tile, take<T>(shared, DEPTH));
}

template <int K, class S, class T>
__device__ void prolong_rows(const S* basis, const T* z, const Index* order, T* y, int rows,
                             int r, int k, int add, int step) {
    DYN_SHARED(shared);
    const int strips = max(1, num_strips<K>(rows - r)), strip = blockIdx.x % strips;
    const Index node = blockIdx.x / strips;
    const Index* const mine = order ? order + node * rows : nullptr;
    y += node * step * k;
    z += node * r * k;
    const Rows<T> rest = {mine ? y : y + Index(r) * k, mine ? mine + r : nullptr, k};
    row_products<K>(basis + node * (rows - r) * r, rows - r, r, Rows<const T>{z, nullptr, k},
                    Rows<const T>{add ? rest.first : nullptr, rest.index, k}, rest, strip,
                    take<T>(shared, DEPTH + 32));
    const int threads = blockDim.x * blockDim.y;
#pragma unroll 1
    for (int e = strip * threads + thread_number(); e < r * k; e += strips * threads) {
        const Rows<T> all = {y, mine, k};
        if (!all.is_real(e / k)) continue;
        T* const to = all.row(e / k) + e % k;
        *to = add ? *to + z[e] : z[e];
    }
}

template <int K, class S, class T>
__device__ void couple(const S* b, const T* w, T* z, int r, int k, int add) {
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
__device__ void block_diagonal(const T* d, const T* x, const Index* index, T* y, int m, int k,
                               int scattered) {
    DYN_SHARED(shared);
    const int strips = num_strips<K>(m);
    const Index node = blockIdx.x / strips;
    index += node * m;
    const Rows<T> to = {scattered ? y : y + node * m * k, scattered ? index : nullptr, k};
    row_products<K>(d + node * m * m, m, m, Rows<const T>{x, index, k},
                    Rows<const T>{nullptr, nullptr, k}, to, blockIdx.x % strips,
                    take<T>(shared, DEPTH + 32));
}

#define BASIS_PRODUCTS(suffix, S, T, K)                                                          \
    extern "C" __global__ void __launch_bounds__(256, 4) restrict_rows_##suffix##_##K(           \
        const S* basis, const T* x, const long long* order, T* w, int rows, int r, int k,        \
        int step) {                                                                              \
        restrict_rows<K, S, T>(basis, x, order, w, rows, r, k, step);                            \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4) prolong_rows_##suffix##_##K(            \
        const S* basis, const T* z, const long long* order, T* y, int rows, int r, int k,        \
        int add, int step) {                                                                     \
        prolong_rows<K, S, T>(basis, z, order, y, rows, r, k, add, step);                        \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4)                                         \
        couple_##suffix##_##K(const S* b, const T* w, T* z, int r, int k, int add) {             \
        couple<K, S, T>(b, w, z, r, k, add);                                                     \
    }
#define BLOCK_DIAGONAL(suffix, T, K)                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) block_diagonal_##suffix##_##K(          \
        const T* d, const T* x, const long long* index, T* y, int m, int k, int scattered) {     \
        block_diagonal<K, T>(d, x, index, y, m, k, scattered);                                   \
    }
BASIS_PRODUCTS(f32, float, float, 1)
BASIS_PRODUCTS(f32, float, float, 2)
BASIS_PRODUCTS(f32, float, float, 4)
BASIS_PRODUCTS(f32, float, float, 8)
BASIS_PRODUCTS(f64, double, double, 1)
BASIS_PRODUCTS(f64, double, double, 2)
BASIS_PRODUCTS(f64, double, double, 4)
BASIS_PRODUCTS(f64, double, double, 8)
BASIS_PRODUCTS(bf16, unsigned short, float, 1)
BASIS_PRODUCTS(bf16, unsigned short, float, 2)
BASIS_PRODUCTS(bf16, unsigned short, float, 4)
BASIS_PRODUCTS(bf16, unsigned short, float, 8)
BLOCK_DIAGONAL(f32, float, 1)
BLOCK_DIAGONAL(f32, float, 2)
BLOCK_DIAGONAL(f32, float, 4)
BLOCK_DIAGONAL(f32, float, 8)
BLOCK_DIAGONAL(f64, double, 1)
BLOCK_DIAGONAL(f64, double, 2)
BLOCK_DIAGONAL(f64, double, 4)
BLOCK_DIAGONAL(f64, double, 8)
