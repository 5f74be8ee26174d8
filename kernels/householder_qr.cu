// Householder QR of a stack, a = Q [R; 0], blocked; and Q in full.
// Golub and Van Loan, Matrix Computations (4th ed.), section 5.2; Schreiber and Van Loan, A
// storage-efficient WY representation, SIAM J. Sci. Stat. Comput. 10 (1989).
//
//   a  (nodes, m, k) by rows, k <= m; overwritten by the reflectors, unit heads included
//   r  (nodes, k, k) out: upper triangular by rows, its diagonal of any sign
//   factors (nodes, ceil(k / 8), 8, 8) out: triangular factors of the blocks of reflectors
//   q  (nodes, m, m) out: Q by rows, from what householder_qr left in a and factors
//
// Launch: blocks of (32, sharers, groups) threads, 64 to 512: warps of one group share 32 columns.
// householder_qr: nodes blocks. householder_q: (nodes, ceil(m / (32 groups))) blocks.
// Shared memory: sizeof(T) (336 + 8 threads + 9 M) bytes, M = m rounded up to a multiple of
// 16 / sizeof(T): 184 KB for m = 2048 in float64 with 512 threads.
// householder_qr_tall, householder_q_tall are for matrices with more rows than that has room for:
// panels (nodes, ceil(k / 8), 9 M) lie in global memory and stay there from one to the other
// (instead of in a); shared memory without the 9 M.
//
// Panels of 8 columns, one thread a row: the inner products of the column in hand with all 8 are
// one reduction, from which follow the reflector, what it does to the later columns, and its
// column of the triangular factor F. I - V F V^T then goes over the columns right of the panel, or
// of Q, one lane a column. Both are bound by that: 2 k^2 (m - k / 3) flops for R, 4 k (m^2 - m k +
// k^2 / 3) for Q, at 3 sizeof(T) bytes for each 32 flops, mostly from L2.
#include "common.cuh"

constexpr int WIDTH = 8;  // of a panel
constexpr int MOST_WARPS = 16;

// Rows a lane has in registers at a time, 16 bytes of a column of the panel; of the panel's groups
// each starts on 16 bytes, some banks from the one before.
template <class T>
constexpr int GROUP = 16 / sizeof(T);
template <class T>
constexpr int PITCH = (WIDTH + 1) * GROUP<T>;

__device__ __forceinline__ int threads() { return 32 * blockDim.y * blockDim.z; }

__device__ __forceinline__ int number() {
    return 32 * (threadIdx.z * blockDim.y + threadIdx.y) + threadIdx.x;
}

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
    for (int e = number(); e < filled * WIDTH; e += threads()) {
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
    const int lane = threadIdx.x;
    T value = 0;
    for (int e = lane; e < threads() / 32 * WIDTH; e += 32) value = Operation()(value, sums[e]);
    value = Operation()(value, __shfl_xor_sync(FULL_WARP, value, 8));
    return Operation()(value, __shfl_xor_sync(FULL_WARP, value, 16));
}

// Leaves V (heads 1, or 0 for no reflection) and F with H_0 H_1 ... = I - V F V^T, and writes the
// panel's own block of R.
template <class T>
__device__ void factor_panel(const Panel<T>& p, T largest, T* r, int k, int columns) {
    const int own = number(), lane = threadIdx.x, warp = own / 32;
    for (int offset = 8; offset < 32; offset *= 2)
        largest = Largest()(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
    if (lane < WIDTH) p.sums[warp * WIDTH + lane] = largest;
    if (own < WIDTH)
        for (int t = 0; t < WIDTH; ++t) p.factor[own * WIDTH + t] = 0;
    __syncthreads();

    largest = over_warps<Largest>(p.sums);
    const int bound = Limits<T>::exponent;
    const int exponent = largest > 0 ? min(max(ilogb(largest), -bound), bound) : 0;
    for (int t = 0; t < WIDTH; ++t) {
        const T down = scalbn(T(1), -__shfl_sync(FULL_WARP, exponent, t));
        for (int i = own; i < p.rows; i += threads()) p.row(i)[t * GROUP<T>] *= down;
    }

    for (int q = 0; q < columns; ++q) {  // a row is only ever touched by its thread
        T* const sums = p.sums + (q + 1) % 2 * (MOST_WARPS * WIDTH);
        T* const head_row = p.heads + q % 2 * WIDTH;
        T dots[WIDTH] = {};
        for (int i = own; i < p.rows; i += threads()) {
            if (i < q) continue;
            const T* const row = p.row(i);
            const T x = row[q * GROUP<T>];
#pragma unroll
            for (int t = 0; t < WIDTH; ++t) dots[t] += x * row[t * GROUP<T>];
        }
        if (own == q)
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
        for (int i = own; i < p.rows; i += threads()) {
            if (i < q) continue;
            T* const row = p.row(i);
            const T v = i == q ? T(1) : row[q * GROUP<T>] * inverse;
            row[q * GROUP<T>] = i == q ? beta : v;
#pragma unroll
            for (int t = 1; t < WIDTH; ++t)
                if (t > q) row[t * GROUP<T>] -= tau * shares[t] * v;
        }
        if (own <= q) {
            T* const line = p.factor + own * WIDTH;
            T product = 0;
#pragma unroll
            for (int t = 0; t < WIDTH; ++t)
                if (t < q) product += line[t] * shares[t];
            line[q] = own == q ? tau : -tau * product;
        }
    }

    for (int q = 0; q < columns; ++q) {
        const T up = scalbn(T(1), __shfl_sync(FULL_WARP, exponent, q));
        if (own < columns) {  // its row
            T* const x = p.row(own) + q * GROUP<T>;
            r[Index(own) * k + q] = q < own ? T(0) : *x * up;
            if (q == own) *x = p.factor[q * WIDTH + q] == 0 ? T(0) : T(1);
            if (q > own) *x = 0;
        }
    }
}

// A group of rows of a lane's column of x, of which `left` are left.
template <class T>
__device__ __forceinline__ Group<T> read(const T* x, int stride, int left) {
    Group<T> values;
#pragma unroll
    for (int g = 0; g < GROUP<T>; ++g) values.value[g] = g < left ? x[g * stride] : T(0);
    return values;
}

// x -= V G^T V^T x for a lane's own column of x, where `inside`, and G what `factor` holds. The
// warps of one threadIdx.z share the column: each takes every blockDim.y-th group of rows.
template <class T>
__device__ __forceinline__ void reflect(const Panel<T>& p, T* x, int stride, bool inside) {
    const int step = blockDim.y * GROUP<T>, begin = threadIdx.y * GROUP<T>;
    T w[WIDTH] = {};
    x += Index(begin) * stride;
    if (inside) {
        const T* column = x;
        const T* v = p.row(begin);
        Group<T> values = read(column, stride, p.rows - begin);
        for (int left = p.rows - begin; left > 0; left -= step) {
            column += step * stride;
            const Group<T> next = read(column, stride, left - step);  // while these are used
#pragma unroll
            for (int q = 0; q < WIDTH; ++q) {
                const Group<T> factors = reinterpret_cast<const Group<T>*>(v)[q];
#pragma unroll
                for (int g = 0; g < GROUP<T>; ++g) w[q] += factors.value[g] * values.value[g];
            }
            v += blockDim.y * PITCH<T>;
            values = next;
        }
    }

    // Summed in place: whatever a thread overwrites it alone has read.
    T* const sums = p.scratch + threadIdx.z * blockDim.y * (WIDTH * 32) + threadIdx.x;
#pragma unroll
    for (int q = 0; q < WIDTH; ++q) sums[(threadIdx.y * WIDTH + q) * 32] = w[q];
    __syncthreads();
    for (int q = threadIdx.y; q < WIDTH; q += blockDim.y) {
        T sum = 0;
        for (int part = 0; part < blockDim.y; ++part) sum += sums[(part * WIDTH + q) * 32];
        sums[q * 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < WIDTH; ++q) w[q] = 0;
#pragma unroll 1
    for (int t = 0; t < WIDTH; ++t) {
        const T sum = sums[t * 32];
#pragma unroll
        for (int q = 0; q < WIDTH; ++q) w[q] += p.factor[t * WIDTH + q] * sum;
    }

    if (inside) {
        const T* v = p.row(begin);
        Group<T> values = read(x, stride, p.rows - begin);
        for (int left = p.rows - begin; left > 0; left -= step) {
            const Group<T> next = read(x + step * stride, stride, left - step);
#pragma unroll
            for (int q = 0; q < WIDTH; ++q) {
                const Group<T> factors = reinterpret_cast<const Group<T>*>(v)[q];
#pragma unroll
                for (int g = 0; g < GROUP<T>; ++g) values.value[g] -= factors.value[g] * w[q];
            }
#pragma unroll
            for (int g = 0; g < GROUP<T>; ++g)
                if (g < left) x[g * stride] = values.value[g];
            x += step * stride;
            v += blockDim.y * PITCH<T>;
            values = next;
        }
    }
}

// Values of a panel, the first of which is that of `outside` where it is not in shared memory.
template <class T>
__device__ __forceinline__ Index panel_size(int m) {
    return Index(m + GROUP<T> - 1) / GROUP<T> * PITCH<T>;
}

template <bool TALL, class T>
__device__ __forceinline__ Panel<T> carve(int m, T* outside) {
    DYN_SHARED(shared);
    Panel<T> p;
    p.factor = take<T>(shared, WIDTH * WIDTH);
    p.heads = take<T>(shared, 2 * WIDTH);
    p.sums = take<T>(shared, 2 * WIDTH * MOST_WARPS);
    p.scratch = take<T>(shared, WIDTH * threads());
    if constexpr (TALL) p.v = outside;
    else p.v = take<T>(shared, int(panel_size<T>(m)));
    p.rows = m;
    return p;
}

template <bool TALL, class T>
__device__ void householder_qr(T* a, T* panels, T* r, T* factors, int m, int k) {
    a += Index(blockIdx.x) * m * k;
    r += Index(blockIdx.x) * k * k;
    const Index before = Index(blockIdx.x) * ((k + WIDTH - 1) / WIDTH);  // panels
    factors += before * WIDTH * WIDTH;

    Panel<T> p = carve<TALL>(m, panels + before * panel_size<T>(m));
    for (int left = k; left > 0; left -= WIDTH) {  // columns from the panel's first on
        const int columns = min(WIDTH, left);
        const T largest = load_panel(p, a, k, columns);
        factor_panel(p, largest, r, k, columns);
        __syncthreads();
        for (int e = number(); e < p.rows * WIDTH && !TALL; e += threads())
            if (e % WIDTH < columns)
                a[Index(e / WIDTH) * k + e % WIDTH] = p.row(e / WIDTH)[e % WIDTH * GROUP<T>];
        if (number() < WIDTH * WIDTH) factors[number()] = p.factor[number()];
        for (int tile = 0; tile < left - WIDTH; tile += 32 * blockDim.z) {
            const int j = WIDTH + tile + 32 * threadIdx.z + threadIdx.x;
            reflect(p, a + j, k, j < left);
            __syncthreads();
        }
        // The panel's rows of R, right of its own block: done.
        for (int e = number(); e < columns * (left - columns); e += threads()) {
            const int i = e / (left - columns), j = columns + e % (left - columns);
            r[Index(i) * k + j] = a[Index(i) * k + j];
            r[Index(columns + e / columns) * k + e % columns] = 0;
        }
        p.rows -= WIDTH;
        a += WIDTH * (k + 1);
        r += WIDTH * (k + 1);
        factors += WIDTH * WIDTH;
        if constexpr (TALL) p.v += panel_size<T>(m);
    }
}

template <bool TALL, class T>
__device__ void householder_q(const T* a, T* outside, const T* factors, T* q, int m, int k) {
    const int panels = (k + WIDTH - 1) / WIDTH;
    const int j = 32 * (blockIdx.y * blockDim.z + threadIdx.z) + threadIdx.x;  // column of Q
    a += Index(blockIdx.x) * m * k + Index(panels - 1) * WIDTH * (k + 1);
    q += Index(blockIdx.x) * m * m + j;
    factors += (Index(blockIdx.x + 1) * panels - 1) * WIDTH * WIDTH;

    if (j < m)
        for (int i = threadIdx.y; i < m; i += blockDim.y) q[Index(i) * m] = i == j;
    q += Index(panels - 1) * WIDTH * m;
    Panel<T> p =
        carve<TALL>(m, outside + (Index(blockIdx.x + 1) * panels - 1) * panel_size<T>(m));
    for (int first = (panels - 1) * WIDTH; first >= 0; first -= WIDTH) {
        __syncthreads();
        p.rows = m - first;
        if constexpr (!TALL) load_panel(p, a, k, min(WIDTH, k - first));
        if (number() < WIDTH * WIDTH)
            p.factor[number() % WIDTH * WIDTH + number() / WIDTH] = factors[number()];
        __syncthreads();
        reflect(p, q, m, first <= j && j < m);  // columns further left are still those of 1
        a -= WIDTH * (k + 1);
        q -= Index(WIDTH) * m;
        factors -= WIDTH * WIDTH;
        if constexpr (TALL) p.v -= panel_size<T>(m);
    }
}

#define HOUSEHOLDER_QR(suffix, T)                                                                \
    extern "C" __global__ void __launch_bounds__(512, 1)                                         \
        householder_qr_##suffix(T* a, T* r, T* factors, int m, int k) {                          \
        householder_qr<false, T>(a, nullptr, r, factors, m, k);                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1)                                         \
        householder_qr_tall_##suffix(T* a, T* panels, T* r, T* factors, int m, int k) {          \
        householder_qr<true, T>(a, panels, r, factors, m, k);                                    \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1)                                         \
        householder_q_##suffix(const T* a, const T* factors, T* q, int m, int k) {               \
        householder_q<false, T>(a, nullptr, factors, q, m, k);                                   \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1)                                         \
        householder_q_tall_##suffix(T* panels, const T* factors, T* q, int m, int k) {           \
        householder_q<true, T>(nullptr, panels, factors, q, m, k);                               \
    }
HOUSEHOLDER_QR(f32, float)
HOUSEHOLDER_QR(f64, double)
