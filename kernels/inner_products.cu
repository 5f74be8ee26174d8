// Inner products of many rows with a few of them: the distances that order a cluster tree.
//
//   out[t, i, c] = x[index[t, i]] . x[centers[t, c]], 0 where either index is -1
//   x (N, d);  index (nodes, m), centers (nodes, count <= 8): int64;  out (nodes, m, count)
//
// Launch: inner_products_f32_K, K = 1, 2, 4 or 8 the least that holds `count`; nodes ceil(m /
// (32 warps)) blocks of 32, 64, ... or 256 threads. Shared memory: 2080 sizeof(T) bytes.
//
// One warp takes 32 rows, a few at a time; lanes walk a row, so that it is read by whole
// transactions, once: the floor is nodes m (d + count) sizeof(T) + 8 nodes m bytes.
#include "common.cuh"

constexpr int DEPTH = 2048;  // values of the centers staged at a time

template <int K, class T>
__device__ void inner_products(const T* x, const Index* index, const Index* centers, T* out,
                               int m, int d, int count) {
    constexpr int depth = DEPTH / K, pitch = depth + 32 / K;  // K centers, apart by banks
    constexpr int together = K > 2 ? 2 : 4;                   // rows
    constexpr int sharers = 32 / (together * K);              // lanes with the same sum
    const int lane = threadIdx.x % 32, tiles = (m + blockDim.x - 1) / blockDim.x;
    const int first_row = blockIdx.x % tiles * blockDim.x + threadIdx.x / 32 * 32;
    const Index node = blockIdx.x / tiles;

    DYN_SHARED(shared);
    T* const staged = take<T>(shared, DEPTH + 32);
    const Index mine = first_row + lane < m ? index[node * m + first_row + lane] : -1;

    for (int first = 0; first < d; first += depth) {
        const int width = min(depth, d - first);
        for (int c = 0; c < K; ++c) {
            const Index center = c < count ? centers[node * count + c] : -1;
            for (int j = threadIdx.x; j < width; j += blockDim.x)
                staged[c * pitch + j] = center < 0 ? T(0) : x[center * d + first + j];
        }
        __syncthreads();
#pragma unroll(K == 8 ? 1 : 2)
        for (int group = 0; group < 32; group += together) {
            const T* row[together];
#pragma unroll
            for (int q = 0; q < together; ++q) {
                const Index i = __shfl_sync(FULL_WARP, mine, group + q);
                row[q] = i < 0 ? nullptr : x + i * d + first;
            }
            T sums[together * K] = {};
#pragma unroll 1
            for (int j = lane; j < width; j += 32) {
                T values[together];
#pragma unroll
                for (int q = 0; q < together; ++q) values[q] = row[q] ? row[q][j] : T(0);
#pragma unroll
                for (int c = 0; c < K; ++c) {
                    const T y = staged[c * pitch + j];
#pragma unroll
                    for (int q = 0; q < together; ++q) sums[q * K + c] += values[q] * y;
                }
            }
            const T sum = warp_sums<together * K>(sums);
            const int i = first_row + group + lane / sharers / K, c = lane / sharers % K;
            if (lane % sharers == 0 && i < m && c < count) {
                T* const target = out + (node * m + i) * count + c;
                *target = first ? *target + sum : sum;
            }
        }
        __syncthreads();
    }
}

#define INNER_PRODUCTS(suffix, T, K)                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) inner_products_##suffix##_##K(          \
        const T* x, const long long* index, const long long* centers, T* out, int m, int d,      \
        int count) {                                                                             \
        inner_products<K, T>(x, index, centers, out, m, d, count);                               \
    }
INNER_PRODUCTS(f32, float, 1)
INNER_PRODUCTS(f32, float, 2)
INNER_PRODUCTS(f32, float, 4)
INNER_PRODUCTS(f32, float, 8)
INNER_PRODUCTS(f64, double, 1)
INNER_PRODUCTS(f64, double, 2)
INNER_PRODUCTS(f64, double, 4)
INNER_PRODUCTS(f64, double, 8)
