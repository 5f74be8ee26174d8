// Triangular solves with few right-hand sides: L x = b, L^T x = b.
//
//   lower L (nodes, m, m) by rows, what lies above the diagonal is not used;
//   b, x (nodes, m, k <= 8); with an index, b of L x = b, or x of L^T x = b, is (n, k): row i of node
//   t is at index[t, i], where that is -1 it is 0, or not written
//
// Launch: solve_lower_f32_K, solve_lower_transposed_f32_K, K = 1, 2, 4 or 8 the least that holds
// k; nodes blocks of 64, 96, ... or 512 threads. Shared memory: sizeof(T) times
// 4224 + 32 K ceil(m / 32) bytes; a caller short of it takes fewer columns at a time.
//
// One block a matrix; m^2 sizeof(T) / 2 bytes a matrix are read.
#include "common.cuh"
#include "triangular_solves.cuh"

template <int K, bool TRANSPOSE, class T>
__device__ void solve_lower(const T* lower, const T* b, const Index* index, T* x, int m, int k) {
    DYN_SHARED(shared);
    Shared<K, T> s;
    s.tiles = take<T>(shared, 4 * TILE_SIZE);
    s.x = take<T>(shared, K * BLOCK * ((m + BLOCK - 1) / BLOCK));
    const Index first = Index(blockIdx.x) * m;
    if (index) index += first;
    if (!index || TRANSPOSE) b += first * k;
    load_rows<K>(s.x, b, TRANSPOSE ? nullptr : index, m, k);
    solve_staged<K, TRANSPOSE>(s, lower + first * m, m);
    if (!index || !TRANSPOSE) x += first * k;
    store_rows<K>(x, s.x, TRANSPOSE ? index : nullptr, m, k);
}

#define SOLVE_LOWER(suffix, T, K)                                                                \
    extern "C" __global__ void __launch_bounds__(512, 2) solve_lower_##suffix##_##K(             \
        const T* lower, const T* b, const long long* index, T* x, int m, int k) {                \
        solve_lower<K, false, T>(lower, b, index, x, m, k);                                      \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 2) solve_lower_transposed_##suffix##_##K(  \
        const T* lower, const T* b, const long long* index, T* x, int m, int k) {                \
        solve_lower<K, true, T>(lower, b, index, x, m, k);                                       \
    }
SOLVE_LOWER(f32, float, 1)
SOLVE_LOWER(f32, float, 2)
SOLVE_LOWER(f32, float, 4)
SOLVE_LOWER(f32, float, 8)
SOLVE_LOWER(f64, double, 1)
SOLVE_LOWER(f64, double, 2)
SOLVE_LOWER(f64, double, 4)
SOLVE_LOWER(f64, double, 8)
