// Dot products of columns and squared norms of rows, summed in double in a fixed order.
//
//   column_dots    partial[c, j] = sum of u[i, j] v[i, j] over the rows i of chunk c: u, v (n, k),
//                  partial (chunks, k) double; chunk c has the rows from c * rows on, `rows` of them.
//                  One chunk alone is all there is: it goes to out (k,), and partial is not touched
//   squared_rows   partial[c, i] = sum of x[i, j]^2 over the j of chunk c: x (n, length), partial
//                  (chunks, n) double; chunk c has the places from c * each on, `each` of them
//   pair_dots      out[i, j] = sum of c[u[i], o, j] c[v[i], o, j] over o: c (n, outputs, k), u and v
//                  (pairs,) int64, out (pairs, k) with count = pairs k; summed in T
//   sum_columns    out[j] = sum of partial[c, j] over c: partial (n, k) double, out (k,)
//
// Launch: column_dots grid (chunks, ceil(k / bx)), sum_columns ceil(k / bx) blocks; of (bx, by)
// threads, both powers of two, bx by <= 256 a multiple of 32; bx by * 8 bytes of shared memory.
// squared_rows: blocks of (32, w) threads, w <= 8, one warp a row's chunk, n * chunks in all; no
// shared memory. pair_dots: 256 threads, a number each. Bound by bandwidth: every value is read once. A chunk depends on the shape alone and not
// on the GPU, and with it every bit of the result.
#include "common.cuh"

// The sum over the rows first, first + step, ... < last of what `term` gives; valid where
// threadIdx.y is 0.
template <class Term>
__device__ __forceinline__ double sum_of_rows(Index first, Index last, bool inside, Term term) {
    DYN_SHARED(shared);
    double* const sums = take<double>(shared, blockDim.x * blockDim.y);
    double sum = 0;
    if (inside)
        for (Index i = first + threadIdx.y; i < last; i += blockDim.y) sum += term(i);
    const int mine = thread_number();
    sums[mine] = sum;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) sums[mine] += sums[mine + half * blockDim.x];
    }
    return sums[mine];
}

template <class T>
__device__ void column_dots(const T* u, const T* v, double* partial, T* out, Index n, int k,
                            Index rows) {
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    const Index first = blockIdx.x * rows, last = first + rows < n ? first + rows : n;
    const double sum = sum_of_rows(first, last, j < k, [&](Index i) {
        return double(u[i * k + j]) * double(v[i * k + j]);
    });
    if (threadIdx.y != 0 || j >= k) return;
    if (gridDim.x == 1)
        out[j] = T(sum);
    else
        partial[Index(blockIdx.x) * k + j] = sum;
}

template <class T>
__device__ void sum_columns(const double* partial, T* out, Index n, Index k) {
    const Index j = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    const double sum =
        sum_of_rows(0, n, j < k, [&](Index i) { return partial[i * k + j]; });
    if (threadIdx.y == 0 && j < k) out[j] = T(sum);
}

template <class T>
__device__ void squared_rows(const T* x, double* partial, Index n, Index length, Index each,
                             Index chunks) {
    const Index warp = Index(blockIdx.x) * blockDim.y + threadIdx.y;
    if (warp >= n * chunks) return;  // the whole warp
    const Index row = warp / chunks, chunk = warp % chunks;
    const Index last = (chunk + 1) * each < length ? (chunk + 1) * each : length;
    double sum = 0;
    for (Index j = chunk * each + threadIdx.x; j < last; j += 32) {
        const double value = x[row * length + j];
        sum += value * value;
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) partial[chunk * n + row] = sum;
}

template <class T>
__device__ void pair_dots(const T* c, const Index* u, const Index* v, T* out, Index count,
                          int outputs, int k) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const Index pair = item / k, j = item % k;
    const T* const left = c + u[pair] * outputs * k + j;
    const T* const right = c + v[pair] * outputs * k + j;
    T sum = 0;
    for (int o = 0; o < outputs; ++o) sum += left[Index(o) * k] * right[Index(o) * k];
    out[item] = sum;
}

#define DOTS(suffix, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) column_dots_##suffix(                     \
        const T* u, const T* v, double* partial, T* out, long long n, int k, long long rows) {  \
        column_dots<T>(u, v, partial, out, n, k, rows);                                         \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) sum_columns_##suffix(                     \
        const double* partial, T* out, long long n, long long k) {                              \
        sum_columns<T>(partial, out, n, k);                                                     \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) squared_rows_##suffix(                    \
        const T* x, double* partial, long long n, long long length, long long each,             \
        long long chunks) {                                                                     \
        squared_rows<T>(x, partial, n, length, each, chunks);                                   \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) pair_dots_##suffix(                       \
        const T* c, const long long* u, const long long* v, T* out, long long count,            \
        int outputs, int k) {                                                                   \
        pair_dots<T>(c, u, v, out, count, outputs, k);                                          \
    }
DOTS(f32, float)
DOTS(f64, double)
