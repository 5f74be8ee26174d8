// A level of a solve with a HODLR factor, few right-hand sides: what it makes of x from its sums, and
// the sums of the next level. Of a pair of siblings, the even node's x, Q, w and the odd node's p:
//
//   sums     w = Q^T x in even nodes, p = P^T x in odd ones
//   forward  t = Y^-1 (w - p): x += Q (t - w) in the even node
//   back     t = Y^-T w: x += Q (t - w) in the even node, x -= P t in the odd one
//
//   Q, P (pairs, rows of a node, r), Y (pairs, r, r) lower, by rows
//   w, p (pairs, parts of a node, r, k <= 8), to be added up; p of `forward` alone
//   x (all rows, k), in place
//
// A block has a chunk of a node's rows: it adds up the parts of w and p, solves with Y, applies Q or P
// to its rows and writes its part of the next sums, of which there are so many a node as it has
// chunks. The sums over all rows of a level are what makes levels wait for each other: so a level is
// one launch, and all of the GPU reads its bases, near the root as at the leaves. What every block
// does over again, parts and Y, is small where chunks are as long as the caller makes them.
//
// The two levels are neighbours: `shift` says how often the finer level's nodes, which chunks divide,
// go into those of the level applied, and `next_shift` into those of the next. A null `even` applies
// nothing, a null `next_w` sums nothing, and a null `p` or `next_p` is that of `back`.
//
// Launch: hodlr_step_f32_K, K = 1, 2, 4 or 8 the least that holds k; nodes * ceil(rows / chunk) blocks
// of 64, 96, ... or 512 threads. Shared memory: sizeof(T) times 4224 +
// 32 K (2 ceil(r / 32) + ceil(next_r / 32) + ceil(min(chunk, 2048 / K) / 32)) bytes.
#include "common.cuh"
#include "triangular_solves.cuh"
#include "shared_products.cuh"

// What is of a chunk: its node among those of a level, and its first row there.
struct Place {
    Index node, row;
    int part;

    // A node's chunks are numbered on in the node that it is a part of.
    __device__ __forceinline__ Place(int rows, int chunk, int shift) {
        const int chunks = (rows + chunk - 1) / chunk, finer = blockIdx.x / chunks;
        const int among = finer & ((1 << shift) - 1), number = blockIdx.x % chunks;
        node = finer >> shift;
        row = Index(among) * rows + number * chunk;
        part = among * chunks + number;
    }
    __device__ __forceinline__ bool is_odd() const { return node & 1; }
    __device__ __forceinline__ Index pair() const { return node / 2; }
    template <class T>
    __device__ __forceinline__ const T* basis(const T* even, const T* odd, Index rows,
                                              int r) const {
        return (is_odd() ? odd : even) + (pair() * rows + row) * r;
    }
};

// b += or -= the sum of `parts` vectors (r, k); `partial` holds a value a thread.
template <int K, class T>
__device__ __forceinline__ void add_parts(T* b, const T* sums, int parts, int r, int k, T sign,
                                          T* partial) {
    const int count = r * k, abreast = min(int(blockDim.x), (count + 31) / 32 * 32);
    if (count == 0) return;
    const int groups = blockDim.x / abreast, group = threadIdx.x / abreast;
    for (int e = threadIdx.x % abreast; e < count && group < groups; e += abreast) {
        T sum = 0;
#pragma unroll 4
        for (int q = group; q < parts; q += groups) sum += sums[Index(q) * count + e];
        if (groups > 1) partial[group * abreast + e] = sum;
        else unknown<K>(b, e / k)[e % k * BLOCK] += sign * sum;
    }
    __syncthreads();
    if (groups == 1) return;
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
        T sum = 0;
#pragma unroll 1
        for (int g = 0; g < groups; ++g) sum += partial[g * abreast + e];
        unknown<K>(b, e / k)[e % k * BLOCK] += sign * sum;
    }
    __syncthreads();
}

template <int K, class T>
__device__ __forceinline__ void fill(T* to, int size, T value) {
    for (int e = threadIdx.x; e < size; e += blockDim.x) to[e] = value;
}

// s.x <- what Q or P is multiplied by and taken off x: w - t, or t of an odd node. A barrier must
// come before it is read.
template <int K, class T>
__device__ __forceinline__ void coefficients(Shared<K, T> s, T* w, const T* lower, const T* even_sums,
                                             const T* odd_sums, Place at, int parts, int r, int k) {
    const int size = K * BLOCK * ((r + BLOCK - 1) / BLOCK);
    const Index pair = at.pair(), start = pair * parts * r * k;
    fill<K>(w, size, T(0));
    __syncthreads();
    add_parts<K>(w, even_sums + start, parts, r, k, T(1), s.tiles);
    for (int e = threadIdx.x; e < size; e += blockDim.x) s.x[e] = w[e];
    __syncthreads();
    lower += pair * r * r;
    if (odd_sums) {
        add_parts<K>(s.x, odd_sums + start, parts, r, k, T(-1), s.tiles);
        solve_staged<K, false>(s, lower, r);
    } else {
        solve_staged<K, true>(s, lower, r);
    }
    if (!at.is_odd())
        for (int e = threadIdx.x; e < size; e += blockDim.x) s.x[e] = w[e] - s.x[e];
}

template <int K, class T>
__device__ void hodlr_step(const T* even, const T* odd, const T* lower, const T* w, const T* p,
                           const T* next_even, const T* next_odd, T* next_w, T* next_p, T* x,
                           int rows, int chunk, int shift, int next_shift, int r, int parts,
                           int next_r, int k) {
    DYN_SHARED(shared);
    constexpr int most = 2048 / K;  // rows of a tile
    Shared<K, T> s;
    s.tiles = take<T>(shared, 4 * TILE_SIZE);
    s.x = take<T>(shared, K * BLOCK * ((r + BLOCK - 1) / BLOCK));
    T* const kept = take<T>(shared, K * BLOCK * ((r + BLOCK - 1) / BLOCK));
    const int next_size = K * BLOCK * ((next_r + BLOCK - 1) / BLOCK);
    T* const sums = take<T>(shared, next_size);
    T* const tile = take<T>(shared, K * BLOCK * ((min(chunk, most) + BLOCK - 1) / BLOCK));

    const Place at(rows, chunk, shift), next(rows, chunk, next_shift);
    const int chunks = (rows + chunk - 1) / chunk, begin = blockIdx.x % chunks * chunk;
    const int count = min(chunk, rows - begin);
    const bool applies = even && (!p || !at.is_odd());
    const bool adds = next_w && (next_p || !next.is_odd());
    x += (Index(blockIdx.x / chunks) * rows + begin) * k;
    if (applies) coefficients<K>(s, kept, lower, w, p, at, parts, r, k);
    fill<K>(sums, next_size, T(0));
    const T* const basis = at.basis(even, odd, Index(rows) << shift, r);
    const T* const next_basis = next.basis(next_even, next_odd, Index(rows) << next_shift, next_r);
    for (int first = 0; first < count && (applies || adds); first += most) {
        const int length = min(most, count - first);
        T* const there = x + Index(first) * k;
        load_rows<K>(tile, there, nullptr, length, k);
        __syncthreads();
        if (applies) {
            subtract_rows<K>(tile, basis + Index(first) * r, length, r, s.x);
            __syncthreads();
            store_rows<K>(there, tile, nullptr, length, k);
        }
        if (adds)
            subtract_columns<K>(sums, next_basis + Index(first) * next_r, length, next_r, tile,
                                s.tiles);
        else
            __syncthreads();
    }
    if (!adds) return;
    const Index parts_there = Index(chunks) << next_shift;
    T* const to = (next.is_odd() ? next_p : next_w) +
                  (next.pair() * parts_there + next.part) * next_r * k;
    for (int e = threadIdx.x; e < next_r * k; e += blockDim.x)
        to[e] = -unknown<K>(sums, e / k)[e % k * BLOCK];
}

#define HODLR_STEP(suffix, T, K)                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 1) hodlr_step_##suffix##_##K(              \
        const T* even, const T* odd, const T* lower, const T* w, const T* p, const T* next_even, \
        const T* next_odd, T* next_w, T* next_p, T* x, int rows, int chunk, int shift,           \
        int next_shift, int r, int parts, int next_r, int k) {                                   \
        hodlr_step<K, T>(even, odd, lower, w, p, next_even, next_odd, next_w, next_p, x, rows,   \
                         chunk, shift, next_shift, r, parts, next_r, k);                         \
    }
HODLR_STEP(f32, float, 1)
HODLR_STEP(f32, float, 2)
HODLR_STEP(f32, float, 4)
HODLR_STEP(f32, float, 8)
HODLR_STEP(f64, double, 1)
HODLR_STEP(f64, double, 2)
HODLR_STEP(f64, double, 4)
HODLR_STEP(f64, double, 8)
