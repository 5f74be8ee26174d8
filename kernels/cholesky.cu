// The end of a stack of Cholesky factorizations: what cuSOLVER leaves open.
//
//   lower (nodes, n, n): 0 out above the diagonal
//   info  (nodes,): the order of the failing minor or 0, where that was not a number, which
//         cuSOLVER may take for a pivot, as well
//
// Launch: nodes ceil(n / 32) blocks of 32, 64, ... or 256 threads, 32 rows each. No shared memory.
// Bound by the bytes written, n^2 sizeof(T) / 2 a matrix.
#include "common.cuh"

constexpr int ROWS = 32;

template <class T>
__device__ void finish_cholesky(T* lower, int* info, int n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int strips = (n + ROWS - 1) / ROWS, begin = blockIdx.x % strips * ROWS;
    const Index node = blockIdx.x / strips;
    lower += node * n * n;
    const int end = min(n, begin + ROWS);
    for (int i = begin + warp; i < end; i += warps)
        for (int j = i + 1 + lane; j < n; j += 32) lower[Index(i) * n + j] = 0;

    for (int first = 0; begin == 0 && warp == 0 && first < n; first += 32) {
        const int i = first + lane;
        const T pivot = i < n ? lower[Index(i) * n + i] : T(0);
        const unsigned bad = __ballot_sync(FULL_WARP, pivot != pivot);
        if (bad == 0) continue;
        const int order = first + __ffs(int(bad));
        if (lane == 0 && (info[node] == 0 || order < info[node])) info[node] = order;
        break;
    }
}

#define FINISH_CHOLESKY(suffix, T)                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        finish_cholesky_##suffix(T* lower, int* info, int n) {                                   \
        finish_cholesky<T>(lower, info, n);                                                      \
    }
FINISH_CHOLESKY(f32, float)
FINISH_CHOLESKY(f64, double)
