// Householder QR of a stack: a = Q [R; 0], blocked.
// Golub and Van Loan, Matrix Computations (4th ed.), section 5.2; Schreiber and Van Loan, A
// storage-efficient WY representation, SIAM J. Sci. Stat. Comput. 10 (1989).
//
//   a  (nodes, m, k), k <= m: overwritten, at last by the reflectors
//   q  (nodes, m, m) out: Q by rows;  r (nodes, k, k) out: upper triangular by rows
//   work (nodes, ceil(k / 8), 8, 8): triangular factors of the blocks of reflectors
//
// Launch: nodes blocks of 32, 64, ... or 512 threads. Shared memory:
// sizeof(T) (36 ceil(m / 4) + 8.5 threads + 80) bytes: for m = 2048 in float64 up to 183 KB.
//
// One block a matrix, a panel of 8 columns at a time. The panel is factored in shared memory, one
// thread a row: the inner products of the column in hand with all 8 are one reduction, from which
// follow the reflector, what it does to the later columns, and its line of the triangular factor.
// I - V F V^T is then applied to the columns of a, or for Q of q, that it changes, one lane a
// column: 4 m k (m - k / 2) + ... flops in all, 3 times 8 sizeof(T) / 32 bytes a flop from L2.
#include "common.cuh"

constexpr int WIDTH = 8;  // of a panel
constexpr int MOST_WARPS = 16;

// Rows a lane has in registers at a time, 16 bytes of a column of the panel; of the panel's groups
// each starts on 16 bytes, some banks from the one before.
template <class T>
constexpr int GROUP = 16 / sizeof(T);
template <class T>
constexpr int PITCH = (WIDTH + 1) * GROUP<T>;

// A column of a panel is scaled by a power of two to a largest value of 1 to 2, within this range;
// what is left of it counts as 0 when its square is at most `negligible`.
template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr int exponent = 120;
    static constexpr float negligible = 1e-34f;
};
template <>
struct Limits<double> {
    static constexpr int exponent = 1000;
    static constexpr double negligible = 1e-290;
};

template <class T>
struct alignas(16) Group {
    T value[GROUP<T>];
};

template <class T>
struct Panel {
    T* factor;   // (WIDTH, WIDTH)
    T* heads;    // 2 of WIDTH: the row where the reflector begins
    T* sums;     // 2 of (warps, WIDTH), used in turn
    T* scratch;  // (warps, WIDTH, 32)
    T* v;        // rows from the panel's first on: groups of (WIDTH, GROUP), PITCH apart
    int rows;

    __device__ __forceinline__ T* row(int i) const {  // its columns lie GROUP apart
        return v + i / GROUP<T> * PITCH<T> + i % GROUP<T>;
    }
};

// The panel's columns of a or their reflectors, 0 beyond `columns` and in the rows that fill up a
// group; the largest absolute value of column lane % 8.
template <class T>
__device__ T load_panel(const Panel<T>& p, const T* a, int k, int columns) {
    const int filled = (p.rows + GROUP<T> - 1) / GROUP<T> * GROUP<T>;
    T largest = 0;
    for (int e = threadIdx.x; e < filled * WIDTH; e += blockDim.x) {
        const int i = e / WIDTH, q = e % WIDTH;
        const T x = i < p.rows && q < columns ? a[Index(i) * k + q] : T(0);
        p.row(i)[q * GROUP<T>] = x;
        largest = Largest()(largest, fabs(x));
    }
    return largest;
}

// Over all rows, of what the threads have for the panel's columns: for column lane % 8.
template <class Operation, class T>
__device__ __forceinline__ T over_warps(const T* sums) {
    const int lane = threadIdx.x % 32;
    T value = 0;
    for (int e = lane; e < blockDim.x / 32 * WIDTH; e += 32) value = Operation()(value, sums[e]);
    value = Operation()(value, __shfl_xor_sync(FULL_WARP, value, 8));
    return Operation()(value, __shfl_xor_sync(FULL_WARP, value, 16));
}

// Leaves V (heads 1, or 0 for no reflection) and F with H_0 H_1 ... = I - V F V^T, and writes the
// panel's rows and columns of R.
template <class T>
__device__ void factor_panel(const Panel<T>& p, T largest, T* r, int k, int columns) {
    const int number = threadIdx.x, lane = number % 32, warp = number / 32;
    for (int offset = 8; offset < 32; offset *= 2)
        largest = Largest()(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
    if (lane < WIDTH) p.sums[warp * WIDTH + lane] = largest;
    if (number < WIDTH)
        for (int t = 0; t < WIDTH; ++t) p.factor[number * WIDTH + t] = 0;
    __syncthreads();

    largest = over_warps<Largest>(p.sums);
    const int bound = Limits<T>::exponent;
    const int exponent = largest > 0 ? min(max(ilogb(largest), -bound), bound) : 0;
    for (int t = 0; t < WIDTH; ++t) {
        const T down = scalbn(T(1), -__shfl_sync(FULL_WARP, exponent, t));
        for (int i = number; i < p.rows; i += blockDim.x) p.row(i)[t * GROUP<T>] *= down;
    }

    for (int q = 0; q < columns; ++q) {  // a row is only ever touched by its thread
        T* const sums = p.sums + (q + 1) % 2 * (MOST_WARPS * WIDTH);
        T* const head_row = p.heads + q % 2 * WIDTH;
        T dots[WIDTH] = {};
        for (int i = number; i < p.rows; i += blockDim.x) {
            if (i < q) continue;
            const T* const row = p.row(i);
            const T x = row[q * GROUP<T>];
#pragma unroll
            for (int t = 0; t < WIDTH; ++t) dots[t] += x * row[t * GROUP<T>];
        }
        if (number == q)
            for (int t = 0; t < WIDTH; ++t) head_row[t] = p.row(q)[t * GROUP<T>];
        const T sum = warp_sums<WIDTH>(dots);
        if (lane % 4 == 0) sums[warp * WIDTH + lane / 4] = sum;
        __syncthreads();

        // x - beta e_q = head v with v[q] = 1, and H = I - tau v v^T takes x to beta e_q.
        const T dot = over_warps<Sum>(sums), square = __shfl_sync(FULL_WARP, dot, q);
        T beta = head_row[q], tau = 0, inverse = 0;
        if (!(square <= Limits<T>::negligible)) {
            const T x = beta;
            beta = -copysign(sqrt(square), x);
            inverse = T(1) / (x - beta);  // no cancellation: the signs differ
            tau = (beta - x) / beta;
        }
        // v . column t: a later column's share of v, or the product with an earlier reflector
        const T share = (dot - beta * head_row[lane % WIDTH]) * inverse;
        T shares[WIDTH];
#pragma unroll
        for (int t = 0; t < WIDTH; ++t) shares[t] = __shfl_sync(FULL_WARP, share, t);
        for (int i = number; i < p.rows; i += blockDim.x) {
            if (i < q) continue;
            T* const row = p.row(i);
            const T v = i == q ? T(1) : row[q * GROUP<T>] * inverse;
            row[q * GROUP<T>] = i == q ? beta : v;
#pragma unroll
            for (int t = 1; t < WIDTH; ++t)
                if (t > q) row[t * GROUP<T>] -= tau * shares[t] * v;
        }
        if (number <= q) {
            T* const line = p.factor + number * WIDTH;
            T product = 0;
#pragma unroll
            for (int t = 0; t < WIDTH; ++t)
                if (t < q) product += line[t] * shares[t];
            line[q] = number == q ? tau : -tau * product;
        }
    }

    for (int q = 0; q < columns; ++q) {
        const T up = scalbn(T(1), __shfl_sync(FULL_WARP, exponent, q));
        if (number < columns) {  // its row
            T* const x = p.row(number) + q * GROUP<T>;
            r[Index(number) * k + q] = q < number ? T(0) : *x * up;
            if (q == number) *x = p.factor[q * WIDTH + q] == 0 ? T(0) : T(1);
            if (q > number) *x = 0;
        }
    }
}

// A group of rows of a lane's column of x.
template <class T>
__device__ __forceinline__ Group<T> read(const T* x, int stride, int i, int rows) {
    Group<T> values;
#pragma unroll
    for (int g = 0; g < GROUP<T>; ++g) values.value[g] = i + g < rows ? x[(i + g) * stride] : T(0);
    return values;
}

// w = V^T x for a lane's column of x, over each `step`-th group of rows.
template <class T>
__device__ __forceinline__ void project(const Panel<T>& p, const T* x, int stride, int first,
                                        int step, T (&w)[WIDTH]) {
    Group<T> values = read(x, stride, first * GROUP<T>, p.rows);
    for (int i = first * GROUP<T>; i < p.rows; i += step * GROUP<T>) {
        const Group<T> next = read(x, stride, i + step * GROUP<T>, p.rows);
        const auto* const group = reinterpret_cast<const Group<T>*>(p.row(i));
#pragma unroll
        for (int q = 0; q < WIDTH; ++q) {
            const Group<T> v = group[q];
#pragma unroll
            for (int g = 0; g < GROUP<T>; ++g) w[q] += v.value[g] * values.value[g];
        }
        values = next;
    }
}

// x -= V w.
template <class T>
__device__ __forceinline__ void subtract(const Panel<T>& p, T* x, int stride, int first, int step,
                                         const T (&w)[WIDTH]) {
    Group<T> values = read(x, stride, first * GROUP<T>, p.rows);
    for (int i = first * GROUP<T>; i < p.rows; i += step * GROUP<T>) {
        const Group<T> next = read(x, stride, i + step * GROUP<T>, p.rows);
        const auto* const group = reinterpret_cast<const Group<T>*>(p.row(i));
#pragma unroll
        for (int q = 0; q < WIDTH; ++q) {
            const Group<T> v = group[q];
#pragma unroll
            for (int g = 0; g < GROUP<T>; ++g) values.value[g] -= v.value[g] * w[q];
        }
#pragma unroll
        for (int g = 0; g < GROUP<T>; ++g)
            if (i + g < p.rows) x[(i + g) * stride] = values.value[g];
        values = next;
    }
}

// w <- F w, or F^T w; in place, as F is upper triangular.
template <bool TRANSPOSE, class T>
__device__ __forceinline__ void multiply(const T* factor, T (&w)[WIDTH]) {
#pragma unroll
    for (int p = 0; p < WIDTH; ++p) {
        const int q = TRANSPOSE ? WIDTH - 1 - p : p;
        T sum = 0;
#pragma unroll
        for (int t = 0; t < WIDTH; ++t)
            if (TRANSPOSE ? t <= q : t >= q)
                sum += factor[TRANSPOSE ? t * WIDTH + q : q * WIDTH + t] * w[t];
        w[q] = sum;
    }
}

// x <- (I - V F V^T) x, or with F^T; x (rows, columns) by rows, `stride` apart.
template <class T>
__device__ void reflect(const Panel<T>& p, T* x, int columns, int stride, bool transpose) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int tiles = (columns + 31) / 32;
    if (tiles == 0) return;
    // Fewer tiles of 32 columns than warps: several share one, and it is a single round.
    const int sharers = max(1, warps / tiles), part = warp % sharers;
    for (int round = 0; round < tiles; round += warps / sharers) {
        const int tile = round + warp / sharers, j = tile * 32 + lane;
        T w[WIDTH] = {};
        if (j < columns) project(p, x + j, stride, part, sharers, w);
        if (sharers > 1) {
            T* const mine = p.scratch + warp * (WIDTH * 32) + lane;
            T* const sums = mine - part * (WIDTH * 32);
#pragma unroll
            for (int q = 0; q < WIDTH; ++q) mine[q * 32] = w[q];
            __syncthreads();
            for (int q = part; q < WIDTH; q += sharers) {  // in place: a thread's own q alone
                T sum = 0;
                for (int other = 0; other < sharers && tile < tiles; ++other)
                    sum += sums[(other * WIDTH + q) * 32];
                sums[q * 32] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int q = 0; q < WIDTH; ++q) w[q] = sums[q * 32];
        }
        if (transpose) multiply<true>(p.factor, w);
        else multiply<false>(p.factor, w);
        if (j < columns) subtract(p, x + j, stride, part, sharers, w);
    }
}

template <class T>
__device__ void householder_qr(T* a, T* q, T* r, T* work, int m, int k) {
    const int number = threadIdx.x, lane = number % 32, warp = number / 32;
    const int warps = blockDim.x / 32, panels = (k + WIDTH - 1) / WIDTH;
    const Index node = blockIdx.x;
    a += node * m * k;
    q += node * m * m;
    r += node * k * k;
    work += node * panels * WIDTH * WIDTH;

    DYN_SHARED(shared);
    Panel<T> p;
    p.factor = take<T>(shared, WIDTH * WIDTH);
    p.heads = take<T>(shared, 2 * WIDTH);
    p.sums = take<T>(shared, 2 * WIDTH * MOST_WARPS);
    p.scratch = take<T>(shared, WIDTH * blockDim.x);
    p.v = take<T>(shared, (m + GROUP<T> - 1) / GROUP<T> * PITCH<T>);

    for (int panel = 0; panel < panels; ++panel) {
        const int first = panel * WIDTH, columns = min(WIDTH, k - first);
        T* const corner = a + Index(first) * k + first;
        p.rows = m - first;
        const T largest = load_panel(p, corner, k, columns);
        factor_panel(p, largest, r + Index(first) * k + first, k, columns);
        __syncthreads();
        for (int e = number; e < p.rows * WIDTH; e += blockDim.x)
            if (e % WIDTH < columns)
                corner[Index(e / WIDTH) * k + e % WIDTH] = p.row(e / WIDTH)[e % WIDTH * GROUP<T>];
        for (int e = number; e < WIDTH * WIDTH; e += blockDim.x)
            work[panel * WIDTH * WIDTH + e] = p.factor[e];
        reflect(p, corner + WIDTH, k - first - columns, k, true);
        __syncthreads();
    }

    for (int i = warp; i < k; i += warps) {
        const int first = i / WIDTH * WIDTH;
        for (int j = lane; j < k; j += 32)
            if (j < first || j >= first + WIDTH)
                r[Index(i) * k + j] = j < first ? T(0) : a[Index(i) * k + j];
    }
    for (int i = warp; i < m; i += warps)
        for (int j = lane; j < m; j += 32) q[Index(i) * m + j] = i == j;
    for (int panel = panels - 1; panel >= 0; --panel) {
        const int first = panel * WIDTH;
        __syncthreads();
        p.rows = m - first;
        load_panel(p, a + Index(first) * k + first, k, min(WIDTH, k - first));
        for (int e = number; e < WIDTH * WIDTH; e += blockDim.x)
            p.factor[e] = work[panel * WIDTH * WIDTH + e];
        __syncthreads();
        reflect(p, q + Index(first) * m + first, m - first, m, false);
    }
}

#define HOUSEHOLDER_QR(name, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 2)                                         \
        name(T* a, T* q, T* r, T* work, int m, int k) {                                          \
        householder_qr<T>(a, q, r, work, m, k);                                                  \
    }
HOUSEHOLDER_QR(householder_qr_f32, float)
HOUSEHOLDER_QR(householder_qr_f64, double)
