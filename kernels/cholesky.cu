// The end of a stack of Cholesky factorizations: what cuSOLVER leaves open.
//
//   lower (nodes, n, n): 0 out above the diagonal
//   found (pieces, nodes): what cuSOLVER said of every `piece` rows, 0 where they are factorized
//   info  (nodes,) out: the order of the failing minor or 0, where that was not a number, which
//         cuSOLVER may take for a pivot, as well
//
// Launch: nodes ceil(n / 32) blocks of 32, 64, ... or 256 threads, 32 rows each. No shared memory.
// Bound by the bytes written, n^2 sizeof(T) / 2 a matrix.
#include "common.cuh"

constexpr int ROWS = 32;

template <class T>
__device__ void finish_cholesky(T* lower, const int* found, int* info, int n, int piece) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int strips = (n + ROWS - 1) / ROWS, begin = blockIdx.x % strips * ROWS;
    const Index node = blockIdx.x / strips, nodes = gridDim.x / strips;
    lower += node * n * n;
    const int end = min(n, begin + ROWS);
    for (int i = begin + warp; i < end; i += warps)
        for (int j = i + 1 + lane; j < n; j += 32) lower[Index(i) * n + j] = 0;

    if (begin > 0 || warp > 0) return;
    int order = 0;
    for (int first = 0; first < n && order == 0; first += piece) {
        const int said = found[first / piece * nodes + node];
        order = said > 0 ? said + first : said;
    }
    for (int first = 0; first < n; first += 32) {
        const int i = first + lane;
        const T pivot = i < n ? lower[Index(i) * n + i] : T(0);
        const unsigned bad = __ballot_sync(FULL_WARP, pivot != pivot);
        if (bad == 0) continue;
        const int of_nan = first + __ffs(int(bad));
        if (order == 0 || of_nan < order) order = of_nan;
        break;
    }
    if (lane == 0) info[node] = order;
}

#define FINISH_CHOLESKY(suffix, T)                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        finish_cholesky_##suffix(T* lower, const int* found, int* info, int n, int piece) {      \
        finish_cholesky<T>(lower, found, info, n, piece);                                        \
    }
FINISH_CHOLESKY(f32, float)
FINISH_CHOLESKY(f64, double)
