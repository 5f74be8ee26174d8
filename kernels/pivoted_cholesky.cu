// Pivoted Cholesky factors of a stack of Gram matrices, R^T R = P^T G P, 32 pivots a panel.
// Higham, Accuracy and Stability of Numerical Algorithms (2002), section 10.3; Lucas, LAPACK Working
// Note 161 (2004).
//
//   gram    (nodes, m, m)      G less what the panels before took off; symmetric, read by rows
//   rows    (nodes, steps, m)  R by rows, columns in the order of G; 0 before the first panel
//   squares (nodes, m)         diagonal of what is left of G, -1 in columns chosen
//   chosen  (nodes, steps)     columns in the order in which they were chosen
//   ranks   (nodes,)           pivots so far; 0 before the first panel
//   stop    (nodes,)           a node has ended when the trace of what is left is not above that
//   pivots  (nodes, m)         out: chosen columns, then the others in natural order
//   r       (nodes, steps, m)  out: R upper trapezoidal, columns in the order of `pivots`
//
// Launch, for first = 0, 32, ...: pivoted_cholesky_panel, nodes blocks of 32, 64, ... or 768
// threads; then by GEMM G -= rows[first : first + width]^T rows[first : first + width].
// Shared memory: 1280 bytes. At last pivoted_cholesky_order, nodes blocks of 32 threads, and
// pivoted_cholesky_rows, nodes ceil(steps / 8) blocks of (32, 8) threads.
//
// A block a matrix, and a thread the same columns throughout. A step reads one row of G and the rows
// of R that the panel has so far, 16 m values on average, mostly from L2, and has one barrier: every
// warp picks the pivot for itself from what the warps found while they brought the diagonal forward.
// Double alone: float32 samples need a Gram matrix of twice their digits.
#include "common.cuh"

struct Best {
    double square;  // the largest on the diagonal
    double trace;
    int column;
};

__device__ __forceinline__ void meet(Best& best, double square, int column) {
    if (square > best.square || (square == best.square && column < best.column)) {
        best.square = square;
        best.column = column;
    }
}

// A column's diagonal value; one that is chosen does not count. Written so that a NaN gets through.
__device__ __forceinline__ void count(Best& best, double square, int column) {
    meet(best, square, column);
    best.trace += square < 0 ? 0.0 : square;
}

// The same bits in all lanes.
__device__ Best warp_best(Best best) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const double square = __shfl_xor_sync(FULL_WARP, best.square, offset);
        const int column = __shfl_xor_sync(FULL_WARP, best.column, offset);
        meet(best, square, column);
    }
    best.trace = warp_sum(best.trace);
    return best;
}

extern "C" __global__ void __launch_bounds__(768)
    pivoted_cholesky_panel_f64(const double* gram, double* rows, double* squares, int* chosen,
                               int* ranks, const double* stop, int m, int steps, int first,
                               int width) {
    const Index node = blockIdx.x;
    if (ranks[node] < first) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const double* const g = gram + node * m * m;
    double* const panel = rows + (node * steps + first) * m;
    double* const square = squares + node * m;
    DYN_SHARED(shared);
    double* const found_squares = take<double>(shared, 64);  // of two steps: a fast warp is one ahead
    double* const found_traces = take<double>(shared, 64);
    int* const found_columns = take<int>(shared, 64);

    Best best = {-1.0, 0.0, m};
    for (int x = threadIdx.x; x < m; x += blockDim.x) count(best, square[x], x);
    int done = 0;
    for (; done < width; ++done) {
        const int turn = 32 * (done % 2);
        best = warp_best(best);
        if (lane == 0) {
            found_squares[turn + warp] = best.square;
            found_traces[turn + warp] = best.trace;
            found_columns[turn + warp] = best.column;
        }
        __syncthreads();
        const bool there = lane < warps;
        best.square = there ? found_squares[turn + lane] : -1.0;
        best.trace = there ? found_traces[turn + lane] : 0.0;
        best.column = there ? found_columns[turn + lane] : m;
        best = warp_best(best);
        if (best.trace <= stop[node] || !(best.square > Limits<double>::negligible)) break;

        const int pivot = best.column;
        const double diagonal = sqrt(best.square);
        best = {-1.0, 0.0, m};
        for (int x = threadIdx.x; x < m; x += blockDim.x) {
            double value = 0, left = square[x];
            if (x == pivot) {
                value = diagonal;
                left = -1;
            } else if (!(left < 0)) {
                value = g[Index(pivot) * m + x];
#pragma unroll 4
                for (int i = 0; i < done; ++i)
                    value -= panel[Index(i) * m + x] * panel[Index(i) * m + pivot];
                value /= diagonal;
                left -= value * value;
                if (left < 0) left = 0;
            }
            panel[Index(done) * m + x] = value;
            square[x] = left;
            count(best, left, x);
        }
        if (threadIdx.x == 0) chosen[node * steps + first + done] = pivot;
    }
    if (threadIdx.x == 0) ranks[node] = first + done;
}

extern "C" __global__ void pivoted_cholesky_order_f64(const double* squares, const int* chosen,
                                                      const int* ranks, long long* pivots,
                                                      int m, int steps) {
    const Index node = blockIdx.x;
    const int lane = threadIdx.x, rank = ranks[node];
    pivots += node * m;
    for (int i = lane; i < rank; i += 32) pivots[i] = chosen[node * steps + i];
    int place = rank;
    for (int first = 0; first < m; first += 32) {
        const int x = first + lane;
        const bool left = x < m && !(squares[node * m + x] < 0);
        const unsigned votes = __ballot_sync(FULL_WARP, left);
        if (left) pivots[place + __popc(votes & ((1u << lane) - 1))] = x;
        place += __popc(votes);
    }
}

extern "C" __global__ void pivoted_cholesky_rows_f64(const double* rows, const long long* pivots,
                                                     const int* ranks, double* r, int m, int steps) {
    const int blocks = (steps + blockDim.y - 1) / blockDim.y;  // of a node
    const Index node = blockIdx.x / blocks;
    const int i = blockIdx.x % blocks * blockDim.y + threadIdx.y;
    if (i >= steps) return;
    const Index row = (node * steps + i) * m;
    const bool there = i < ranks[node];
    for (int place = threadIdx.x; place < m; place += 32)
        r[row + place] = there && place >= i ? rows[row + pivots[node * m + place]] : 0.0;
}
