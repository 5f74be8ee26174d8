// Column-pivoted Householder QR of the transposes of a stack of samples: S^T P = Q R.
// Golub and Van Loan, Matrix Computations (4th ed.), algorithm 5.4.1; Businger and Golub (1965).
//
//   samples   (nodes, m, s)  S by rows = S^T by columns of length s; overwritten
//   pivots    (nodes, m)     out: rows of S in pivot order, those never chosen in natural order
//   r         (nodes, min(m, s), m)  out: upper trapezoidal by rows; rows from `rank` on are 0
//   tails     (nodes, min(m, s) + 1) out: tails[k] = ||R22||_F^2 after k steps; past the rank,
//             where nothing was eliminated, tails[rank] again
//   ranks     (nodes,)       out: steps done
//   A matrix is left after max_rank steps, or as soon as tails[k] <= threshold (negative: never),
//   or when what is left is 0 to working precision.
//
// Launch: nodes blocks of 32, 64, ... or 512 threads.
// Shared memory: 8 (min(m, s) + 33) + sizeof(T) (2 m + min(m, s)) + 4 m bytes. pivoted_qr_tall is
// for matrices with more rows than that has room for: it has as many bytes a node in global
// memory, `work` (nodes, work_bytes), a multiple of 16, and uses no shared memory.
//
// One block a matrix, one warp a column. Columns stay where they are and the reflector is the
// pivot column itself, so that a step has a single barrier: every warp picks the pivot and forms
// the reflector's scalars for itself, from norms that the step before left in shared memory.
#include "common.cuh"

// Norms are kept squared: the whole matrix is scaled by this power of two.
template <class T>
__device__ int common_exponent(const T* a, Index size, T* scratch) {
    T largest = 0;
    for (Index i = threadIdx.x; i < size; i += blockDim.x) largest = Largest()(largest, fabs(a[i]));
    largest = block_reduce<Largest>(largest, scratch);
    if (!(largest > 0)) return 0;
    return min(max(ilogb(largest), -Limits<T>::exponent), Limits<T>::exponent);
}

template <class T>
struct Pivot {
    T square;  // of its norm below the finished rows
    T tail;    // sum of the squares of all columns left
    int column;
};

// Largest norm, lowest column on ties; columns already chosen carry -1. The same in all lanes.
template <class T>
__device__ Pivot<T> find_pivot(const T* squares, int m, int lane) {
    Pivot<T> best = {T(-1), T(0), -1};
    for (int j = lane; j < m; j += 32) {
        const T square = squares[j];
        if (square > best.square) {
            best.square = square;
            best.column = j;
        }
        best.tail += square < 0 ? T(0) : square;  // written so that a NaN gets through
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        const T square = __shfl_xor_sync(FULL_WARP, best.square, offset);
        const int column = __shfl_xor_sync(FULL_WARP, best.column, offset);
        if (square > best.square || (square == best.square && column < best.column)) {
            best.square = square;
            best.column = column;
        }
    }
    best.tail = warp_sum(best.tail);
    return best;
}

// c <- (I - factor x x^T) c from row k on, where x[k] is read as `head`.
// Returns the square of what is left below row k: as exact as a fresh sum, for no more reading.
template <class T>
__device__ T reflect(T* c, const T* x, T head, T factor, int k, int s, int lane) {
    T dot = lane == 0 ? head * c[k] : T(0);
    for (int i = k + 1 + lane; i < s; i += 32) dot += x[i] * c[i];
    dot = factor * warp_sum(dot);
    T square = 0;
    for (int i = k + 1 + lane; i < s; i += 32) {
        const T y = c[i] - dot * x[i];
        c[i] = y;
        square += y * y;
    }
    if (lane == 0) c[k] -= dot * head;
    return warp_sum(square);
}

template <bool TALL, class T>
__device__ void pivoted_qr(T* samples, Index* pivots, T* r, double* tails, int* ranks,
                           unsigned char* work, Index work_bytes, int m, int s, int max_rank,
                           double threshold) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int steps = min(m, s), limit = min(steps, max_rank);
    const Index node = blockIdx.x;
    T* const a = samples + node * m * s;

    DYN_SHARED(shared);
    if constexpr (TALL) shared = work + node * work_bytes;
    double* const row_squares = take<double>(shared, steps + 1);
    double* const scratch = take<double>(shared, 32);
    T* squares = take<T>(shared, m);       // of the columns' norms below the finished rows
    T* next_squares = take<T>(shared, m);  // two buffers, lest a fast warp overtakes a slow one
    T* const diagonal = take<T>(shared, steps);
    int* const order = take<int>(shared, m);

    const int exponent = common_exponent(a, Index(m) * s, reinterpret_cast<T*>(scratch));
    const T down = scalbn(T(1), -exponent), up = scalbn(T(1), exponent);
    const T enough = T(scalbn(threshold, -2 * exponent));
    for (int j = warp; j < m; j += warps) {
        T square = 0;
        for (int i = lane; i < s; i += 32) {
            const T x = a[Index(j) * s + i] * down;
            a[Index(j) * s + i] = x;
            square += x * x;
        }
        square = warp_sum(square);
        if (lane == 0) squares[j] = square;
    }
    __syncthreads();

    int rank = 0;
    for (; rank < limit; ++rank) {
        const Pivot<T> pivot = find_pivot(squares, m, lane);
        if (pivot.tail <= enough || !(pivot.square > Limits<T>::negligible)) break;
        const T* const x = a + Index(pivot.column) * s;
        const T beta = -copysign(sqrt(pivot.square), x[rank]);
        const T head = x[rank] - beta;  // no cancellation: the signs differ
        const T factor = T(-1) / (beta * head);
        if (threadIdx.x == 0) {
            diagonal[rank] = beta;
            order[rank] = pivot.column;
        }
        for (int j = warp; j < m; j += warps) {
            T square = squares[j];
            if (j == pivot.column)
                square = -1;
            else if (square > 0 || square != square)  // zero columns stay as they are
                square = reflect(a + Index(j) * s, x, head, factor, rank, s, lane);
            if (lane == 0) next_squares[j] = square;
        }
        T* const swap = squares;
        squares = next_squares;
        next_squares = swap;
        __syncthreads();
    }

    if (warp == 0) {  // columns never chosen, in natural order
        int place = rank;
        for (int first = 0; first < m; first += 32) {
            const int j = first + lane;
            const bool left = j < m && !(squares[j] < 0);
            const unsigned votes = __ballot_sync(FULL_WARP, left);
            if (left) order[place + __popc(votes & ((1u << lane) - 1))] = j;
            place += __popc(votes);
        }
    }
    __syncthreads();

    double rest = 0;
    for (int place = rank + warp; place < m; place += warps)
        for (int i = rank + lane; i < s; i += 32) {
            const double x = a[Index(order[place]) * s + i];
            rest += x * x;
        }
    rest = block_reduce<Sum>(rest, scratch);

    for (int place = threadIdx.x; place < m; place += blockDim.x)
        pivots[node * m + place] = order[place];
    for (int i = warp; i < steps; i += warps) {
        T* const row = r + (node * steps + i) * m;
        double square = 0;
        for (int place = lane; place < m; place += 32) {
            T x = 0;
            if (i < rank && place >= i)
                x = place == i ? diagonal[i] : a[Index(order[place]) * s + i];
            row[place] = x * up;
            square += double(x) * x;
        }
        square = warp_sum(square);
        if (lane == 0) row_squares[i] = square;
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        double* const tail = tails + node * (steps + 1);
        double sum = rest;
        for (int i = steps; i >= 0; --i) {
            if (i < rank) sum += row_squares[i];
            tail[i] = scalbn(sum, 2 * exponent);
        }
        ranks[node] = rank;
    }
}

#define PIVOTED_QR(suffix, T)                                                                    \
    extern "C" __global__ void __launch_bounds__(512, 2)                                         \
        pivoted_qr_##suffix(T* samples, long long* pivots, T* r, double* tails, int* ranks,      \
                            int m, int s, int max_rank, double threshold) {                      \
        pivoted_qr<false, T>(samples, pivots, r, tails, ranks, nullptr, 0, m, s, max_rank,       \
                             threshold);                                                         \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1) pivoted_qr_tall_##suffix(               \
        T* samples, long long* pivots, T* r, double* tails, int* ranks, unsigned char* work,     \
        long long work_bytes, int m, int s, int max_rank, double threshold) {                    \
        pivoted_qr<true, T>(samples, pivots, r, tails, ranks, work, work_bytes, m, s, max_rank,  \
                            threshold);                                                          \
    }
PIVOTED_QR(f32, float)
PIVOTED_QR(f64, double)
