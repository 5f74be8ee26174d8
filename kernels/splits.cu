// A level of a recursive bisection: nodes as segments of a permutation, distances, sorting keys.
//
//   pad_segments    out[t, j] = values[a + j], a = offsets[t step], where that is before
//                   offsets[(t + 1) step], else -1: out (nodes, width)
//   join_segments   the way back: out[a - offsets[0] + j] = rows[t, order[t, j]] of the places
//                   before the segment's end; without an order rows[t, j]: rows (nodes, width)
//   gram_distances, angle_distances
//                   d(rows[t, i], cols[t, j]) of inner products (nodes, m, c) and squared norms:
//                   a + b - 2 inner, or 1 - inner^2 / (a b), 1 where a b is 0; or, `summed`,
//                   their sums over j.  rows (nodes, m), cols (nodes, c): a padding of -1 gives
//                   any number.  out (nodes, m, c), or (nodes, m)
//   farthest        out[t] = index[t, i] for the largest distance[t, i], of equal ones the first;
//                   padding comes after all others, a NaN before: index, distance (nodes, m)
//   split_keys      near - far, or the largest number where the squared norm of the index is 0
//   sort_keys       key, the largest number where it is none, infinity for an index of -1
//   offsets, values, rows, cols, order, index: int64
//
// Launch: 256 threads, a number each, of `count` in all; farthest: a block of 32 to 1024 threads a
// node, shared memory 32 (8 + sizeof(T)) bytes. Bound by bandwidth, and most by being a launch.
#include "common.cuh"

__device__ __forceinline__ Index item() {
    return Index(blockIdx.x) * blockDim.x + threadIdx.x;
}

struct Gram {
    template <class T>
    __device__ __forceinline__ T operator()(T inner, T a, T b) const {
        return a + b - T(2) * inner;
    }
};

struct Angle {
    template <class T>
    __device__ __forceinline__ T operator()(T inner, T a, T b) const {
        const T norms = a * b;
        return T(1) - (norms > T(0) ? inner * inner / norms : T(0));
    }
};

template <class Distance, class T>
__device__ void distances(const T* inner, const T* norms, const Index* rows, const Index* cols,
                          T* out, int m, int c, int summed, Index count) {
    const Index i = item(), row = summed ? i : i / c;
    if (i >= count) return;
    const Index* const col = cols + row / m * c;
    const T a = norms[rows[row] < 0 ? 0 : rows[row]];
    const int first = summed ? 0 : int(i % c), last = summed ? c : first + 1;
    T sum = 0;
    for (int j = first; j < last; ++j) {
        const T b = norms[col[j] < 0 ? 0 : col[j]];
        sum += Distance()(inner[row * c + j], a, b);
    }
    out[i] = sum;
}

// Whether the value at one place comes before that at another; a NaN is the largest.
template <class T>
__device__ __forceinline__ bool is_farther(T x, int place, T y, int other) {
    const bool no_x = x != x, no_y = y != y;
    if (no_x != no_y) return no_x;
    return x > y || ((x == y || no_x) && place < other);
}

template <class T>
__device__ __forceinline__ void farther_of_warp(T& value, int& place) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const T x = __shfl_xor_sync(FULL_WARP, value, offset);
        const int other = __shfl_xor_sync(FULL_WARP, place, offset);
        if (is_farther(x, other, value, place)) {
            value = x;
            place = other;
        }
    }
}

template <class T>
__device__ void farthest(const Index* index, const T* distance, Index* out, T least, int m) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    DYN_SHARED(shared);
    T* const values = take<T>(shared, 32);
    int* const places = take<int>(shared, 32);
    index += Index(blockIdx.x) * m;
    distance += Index(blockIdx.x) * m;
    T value = least;
    int place = m - 1;  // of those that have nothing better
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        const T x = index[i] < 0 ? least : distance[i];
        if (is_farther(x, i, value, place)) {
            value = x;
            place = i;
        }
    }
    farther_of_warp(value, place);
    if (lane == 0) {
        values[warp] = value;
        places[warp] = place;
    }
    __syncthreads();
    if (warp > 0) return;
    value = lane < warps ? values[lane] : least;
    place = lane < warps ? places[lane] : m - 1;
    farther_of_warp(value, place);
    if (lane == 0) out[blockIdx.x] = index[place];
}

template <class T>
__device__ void split_keys(const T* near, const T* far, const T* norms, const Index* index,
                           T* out, T last, Index count) {
    const Index i = item();
    if (i >= count) return;
    const T norm = norms[index[i] < 0 ? 0 : index[i]];
    out[i] = norm > T(0) ? near[i] - far[i] : last;
}

template <class T>
__device__ void sort_keys(const T* key, const Index* index, T* out, T last, T end, Index count) {
    const Index i = item();
    if (i >= count) return;
    const T x = key[i];
    out[i] = index[i] < 0 ? end : x < last ? x : last;
}

extern "C" __global__ void __launch_bounds__(256) pad_segments(
    const long long* values, const long long* offsets, long long* out, int width, int step,
    long long count) {
    const Index i = item(), t = i / width;
    if (i >= count) return;
    const Index place = offsets[t * step] + i % width;
    out[i] = place < offsets[(t + 1) * step] ? values[place] : -1;
}

extern "C" __global__ void __launch_bounds__(256) join_segments(
    const long long* rows, const long long* order, const long long* offsets, long long* out,
    int width, int step, long long count) {
    const Index i = item(), t = i / width;
    if (i >= count) return;
    const Index place = offsets[t * step] + i % width;
    if (place < offsets[(t + 1) * step])
        out[place - offsets[0]] = rows[order ? t * width + order[i] : i];
}

#define SPLITS(suffix, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) gram_distances_##suffix(                    \
        const T* inner, const T* norms, const long long* rows, const long long* cols, T* out,     \
        int m, int c, int summed, long long count) {                                              \
        distances<Gram, T>(inner, norms, rows, cols, out, m, c, summed, count);                   \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) angle_distances_##suffix(                   \
        const T* inner, const T* norms, const long long* rows, const long long* cols, T* out,     \
        int m, int c, int summed, long long count) {                                              \
        distances<Angle, T>(inner, norms, rows, cols, out, m, c, summed, count);                  \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(1024) farthest_##suffix(                         \
        const long long* index, const T* distance, long long* out, T least, int m) {              \
        farthest<T>(index, distance, out, least, m);                                              \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) split_keys_##suffix(                        \
        const T* near, const T* far, const T* norms, const long long* index, T* out, T last,      \
        long long count) {                                                                        \
        split_keys<T>(near, far, norms, index, out, last, count);                                 \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) sort_keys_##suffix(                         \
        const T* key, const long long* index, T* out, T last, T end, long long count) {           \
        sort_keys<T>(key, index, out, last, end, count);                                          \
    }
SPLITS(f32, float)
SPLITS(f64, double)
