// Products with a symmetric block-sparse matrix, each block K[a, b] stored once and used twice.
//
//   y[i] += sum of op(B[p]) x[j] over the terms (p, j, transposed) of block row i, in their order
//   blocks B (p, m, m);  starts (nodes + 1,), terms (2 p, 3): int32;  x, y (nodes, m, k)
//
// Launch: block_sparse_narrow_f32_K for k <= K = 1, 2, 4 or 8: nodes ceil(m / (R W)) blocks of
// (R W, 32 / R) threads: W = 1 to 8 warps, R rows each, R = 4 for K <= 2 and 2 above.
// Shared memory: 2080 sizeof(T) bytes.
// block_sparse_wide_f32_C, C = 32 or 64: nodes ceil(m / 64) ceil(k / C) blocks of (C / 4, 64 / R)
// threads, R = 4, or 8 in float32 with C = 64. Shared memory: 16 (64 + C) sizeof(T) + 256 bytes.
// add_terms_f32: y[i] += the terms of row i among the products z (2, count, m, k) of the blocks
// first .. first + count - 1, as stored and transposed: nodes ceil(m k / 256) blocks of 256 threads.
// Large blocks and many columns are multiplied by GEMM, and this adds up what it gives.
//
// One thread block has some rows of one block row and all of its terms: no atomics, the same bits
// every time. Narrow: bound by the bytes of B; the floor is p m^2 sizeof(T), each block once from
// DRAM and once from L2, twice from DRAM where L2 does not hold the blocks (50 MB on an H100). Each
// thread block reads all x of its terms besides, k / (R W) of its bytes of B, from L2. Wide: bound
// by 4 p m^2 k flops; a thread has R rows of 4 columns, so that it reads R + 4 values of shared
// memory for 4 R products; the next 16 rows of the depth are on their way meanwhile.
#include "common.cuh"
#include "narrow_products.cuh"

// Of block row i: its terms, and where one of them lies.
template <class T>
struct Terms {
    const T* blocks;
    const int* terms;
    const T* x;
    int m, k;

    __device__ __forceinline__ bool transposed(int t) const { return terms[3 * Index(t) + 2]; }
    __device__ __forceinline__ const T* block(int t) const {
        return blocks + Index(terms[3 * Index(t)]) * m * m;
    }
    __device__ __forceinline__ const T* columns(int t) const {
        return x + Index(terms[3 * Index(t) + 1]) * m * k;
    }
};

// ---- Few columns ------------------------------------------------------------------------------

template <int K, class T>
__device__ void block_sparse_narrow(const T* blocks, const int* starts, const int* terms,
                                    const T* x, T* y, int m, int k) {
    DYN_SHARED(shared);
    T* const staged = take<T>(shared, DEPTH + 32);
    const int tiles = num_strips<K>(m), tile = blockIdx.x % tiles, node = blockIdx.x / tiles;
    const Terms<T> all = {blocks, terms, x, m, k};
    const Rows<T> out = {y + Index(node) * m * k, nullptr, k};
    const Rows<const T> base = {out.first, nullptr, k};
    const int last = starts[node + 1];
    for (int t = starts[node]; t < last;) {  // terms of one orientation share their sums
        if (all.transposed(t)) {
            T sums[K] = {};
            for (; t < last && all.transposed(t); ++t)
                add_columns<K>(sums, all.block(t), m, m, Rows<const T>{all.columns(t), nullptr, k},
                               tile, staged);
            finish_columns<K>(sums, m, base, out, tile, staged);
            __syncthreads();
        } else {
            T sums[ROWS<K> * K] = {};
            for (; t < last && !all.transposed(t); ++t)
                add_rows<K>(sums, all.block(t), m, m, Rows<const T>{all.columns(t), nullptr, k},
                            tile, staged);
            finish_rows<K>(sums, m, base, out, tile);  // the next sums begin with a barrier
        }
    }
}

// ---- Many columns -----------------------------------------------------------------------------

constexpr int SIDE = 64;       // rows of a tile
constexpr int STEP = 16;       // of the depth
constexpr int MY_COLUMNS = 4;  // of a tile, in a thread
template <int C, class T>
constexpr int MY_ROWS = C == 64 ? 32 / sizeof(T) : 4;
template <class T>
constexpr int GROUP = 16 / sizeof(T);  // values read from shared memory at a time
template <int C, class T>
constexpr int THREADS = C / MY_COLUMNS * (SIDE / MY_ROWS<C, T>);

template <class T>
struct alignas(16) Group {
    T value[GROUP<T>];
};

// Where the i-th of a thread's values lies among `width`, N a thread: groups next to each other.
template <int N, class T>
__device__ __forceinline__ int place(int thread, int i, int width) {
    return i / GROUP<T> * (width / (N / GROUP<T>)) + thread * GROUP<T> + i % GROUP<T>;
}

template <int N, class T>
__device__ __forceinline__ void read_groups(T* values, const T* row, int thread, int width) {
#pragma unroll
    for (int i = 0; i < N; i += GROUP<T>) {
        const Group<T> group =
            *reinterpret_cast<const Group<T>*>(row + place<N, T>(thread, i, width));
#pragma unroll
        for (int q = 0; q < GROUP<T>; ++q) values[i + q] = group.value[q];
    }
}

// A step of the depth: (STEP, SIDE) of op(B) and (STEP, C) of x, held in registers on the way.
template <int C, class T>
struct Held {
    static constexpr int threads = THREADS<C, T>;
    static constexpr int pitch = SIDE + GROUP<T>;  // columns of B on their way in: other banks
    T a[STEP * SIDE / threads], b[STEP * C / threads];
    bool transposed;

    // Threads walk over B as it lies in memory: the q-th value of one is at this depth and row.
    __device__ __forceinline__ int depth(int q) const {
        const int number = thread_number();
        return transposed ? number / SIDE + q * (threads / SIDE) : number % STEP;
    }
    __device__ __forceinline__ int row(int q) const {
        const int number = thread_number();
        return transposed ? number % SIDE : number / STEP + q * (threads / STEP);
    }

    __device__ __forceinline__ void load(const Terms<T>& all, int t, int first, int first_row,
                                         int first_column) {
        const int m = all.m, k = all.k, number = thread_number();
        transposed = all.transposed(t);
        const int above = transposed ? first : first_row, left = transposed ? first_row : first;
        const int over = transposed ? depth(0) : row(0), aside = transposed ? row(0) : depth(0);
        const int step = transposed ? threads / SIDE : threads / STEP;
        const T* from = all.block(t) + Index(above + over) * m + left + aside;
#pragma unroll
        for (int q = 0; q < STEP * SIDE / threads; ++q) {
            a[q] = left + aside < m && above + over + q * step < m ? *from : T(0);
            from += Index(step) * m;
        }
        const int c = first_column + number % C, d = first + number / C;
        from = all.columns(t) + Index(d) * k + c;
#pragma unroll
        for (int q = 0; q < STEP * C / threads; ++q) {
            b[q] = c < k && d + q * (threads / C) < m ? *from : T(0);
            from += Index(threads / C) * k;
        }
    }
    __device__ __forceinline__ void store(T* rows, T* columns) const {
        const int number = thread_number();
#pragma unroll
        for (int q = 0; q < STEP * SIDE / threads; ++q) rows[depth(q) * pitch + row(q)] = a[q];
#pragma unroll
        for (int q = 0; q < STEP * C / threads; ++q) columns[q * threads + number] = b[q];
    }
};

template <int C, class T>
__device__ void block_sparse_wide(const T* blocks, const int* starts, const int* terms, const T* x,
                                  T* y, int m, int k) {
    constexpr int R = MY_ROWS<C, T>;
    DYN_SHARED(shared);
    T* const rows = take<T>(shared, STEP * Held<C, T>::pitch);
    T* const columns = take<T>(shared, STEP * C);
    const int strips = (k + C - 1) / C, tiles = (m + SIDE - 1) / SIDE;
    const int first_column = blockIdx.x % strips * C;
    const int first_row = blockIdx.x / strips % tiles * SIDE, node = blockIdx.x / strips / tiles;
    const Terms<T> all = {blocks, terms, x, m, k};
    const int last = starts[node + 1];
    int t = starts[node], first = 0;
    if (t == last) return;

    Held<C, T> held;
    held.load(all, t, first, first_row, first_column);
    T sums[R][MY_COLUMNS] = {};
    while (t < last) {
        held.store(rows, columns);
        __syncthreads();
        first += STEP;
        if (first >= m) {
            first = 0;
            ++t;
        }
        if (t < last) held.load(all, t, first, first_row, first_column);
#pragma unroll
        for (int d = 0; d < STEP; ++d) {
            T a[R], b[MY_COLUMNS];
            read_groups<R>(a, rows + d * Held<C, T>::pitch, threadIdx.y, SIDE);
            read_groups<MY_COLUMNS>(b, columns + d * C, threadIdx.x, C);
#pragma unroll
            for (int i = 0; i < R; ++i)
#pragma unroll
                for (int c = 0; c < MY_COLUMNS; ++c) sums[i][c] += a[i] * b[c];
        }
        __syncthreads();
    }
    y += Index(node) * m * k;
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const int row = first_row + place<R, T>(threadIdx.y, i, SIDE);
#pragma unroll
        for (int c = 0; c < MY_COLUMNS; ++c) {
            const int column = first_column + place<MY_COLUMNS, T>(threadIdx.x, c, C);
            if (row < m && column < k) y[Index(row) * k + column] += sums[i][c];
        }
    }
}

// ---- Terms that are multiplied already --------------------------------------------------------

template <class T>
__device__ void add_terms(const int* starts, const int* terms, const T* z, T* y, int first,
                          int count, Index values) {
    const Index tiles = (values + blockDim.x - 1) / blockDim.x, node = blockIdx.x / tiles;
    const Index e = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (e >= values) return;
    T sum = y[node * values + e];
    for (int t = starts[node]; t < starts[node + 1]; ++t) {
        const int p = terms[3 * Index(t)] - first;
        if (p >= 0 && p < count)
            sum += z[(Index(terms[3 * Index(t) + 2]) * count + p) * values + e];
    }
    y[node * values + e] = sum;
}

#define ADD_TERMS(suffix, T)                                                                     \
    extern "C" __global__ void __launch_bounds__(256) add_terms_##suffix(                        \
        const int* starts, const int* terms, const T* z, T* y, int first, int count,             \
        long long values) {                                                                      \
        add_terms<T>(starts, terms, z, y, first, count, values);                                 \
    }
ADD_TERMS(f32, float)
ADD_TERMS(f64, double)

#define BLOCK_SPARSE_NARROW(suffix, T, K)                                                        \
    extern "C" __global__ void __launch_bounds__(256, 3) block_sparse_narrow_##suffix##_##K(     \
        const T* blocks, const int* starts, const int* terms, const T* x, T* y, int m, int k) {  \
        block_sparse_narrow<K, T>(blocks, starts, terms, x, y, m, k);                            \
    }
BLOCK_SPARSE_NARROW(f32, float, 1)
BLOCK_SPARSE_NARROW(f32, float, 2)
BLOCK_SPARSE_NARROW(f32, float, 4)
BLOCK_SPARSE_NARROW(f32, float, 8)
BLOCK_SPARSE_NARROW(f64, double, 1)
BLOCK_SPARSE_NARROW(f64, double, 2)
BLOCK_SPARSE_NARROW(f64, double, 4)
BLOCK_SPARSE_NARROW(f64, double, 8)

#define BLOCK_SPARSE_WIDE(suffix, T, C)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS<C, T>, 512 / THREADS<C, T>)             \
        block_sparse_wide_##suffix##_##C(const T* blocks, const int* starts, const int* terms,   \
                                         const T* x, T* y, int m, int k) {                       \
        block_sparse_wide<C, T>(blocks, starts, terms, x, y, m, k);                              \
    }
BLOCK_SPARSE_WIDE(f32, float, 32)
BLOCK_SPARSE_WIDE(f32, float, 64)
BLOCK_SPARSE_WIDE(f64, double, 32)
BLOCK_SPARSE_WIDE(f64, double, 64)
