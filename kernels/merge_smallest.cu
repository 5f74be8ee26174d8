// Short sorted lists of (value, index) by row, merged with values found for some of the rows.
//
//   list rows[t, i] <- the `count` smallest of itself and of (found[t, i, j], candidates[t, j])
//   by value, equal values by index; of an index met twice the smaller value counts; the row's own
//   index, -1 (padding) and what is not finite are left out
//   values (n, count) ascending, infinity where there is none;  index (n, count), there -1: int64
//   rows (nodes, m), each list at most once, -1 for none;  found (nodes, m, c);
//   candidates (nodes, c) different in a node: int64
//
// Launch: merge_smallest_f32 or _f64: ceil(nodes m / warps) blocks of 32, 64, ... or 256 threads.
// Shared memory: warps count (8 + sizeof(T)) bytes; merge_smallest_long_f32 or _f64, for lists
// longer than that has room for: none.
//
// One warp takes a row and has its list in shared memory, or leaves a long one where it is. Lanes read the values found, once, by
// whole transactions, and the index only of those that are small enough to enter the list; they
// are inserted one after the other. The floor is nodes m c sizeof(T) bytes; the insertions, about
// count (1 + log(c / count)) a row where its list is new, take longer for a short row.
#include "common.cuh"

template <class T>
struct List {
    T* value;
    Index* index;
    int count;

    // Inserts one finite value for the whole warp.
    __device__ __forceinline__ void insert(T x, Index candidate) {
        const int lane = threadIdx.x % 32;
        int place = 0, end = count - 1;  // entries place .. end - 1 go one up, over entry `end`
        for (int first = 0; first < count; first += 32) {
            const int e = first + lane;
            const bool before =
                e < count && (value[e] < x || (value[e] == x && index[e] < candidate));
            place += __popc(__ballot_sync(FULL_WARP, before));
            const unsigned same =
                __ballot_sync(FULL_WARP, e < count && index[e] == candidate);
            if (same) end = first + __ffs(int(same)) - 1;
        }
        if (place > end) return;
        for (int first = end / 32 * 32; first >= place / 32 * 32; first -= 32) {
            const int e = first + lane;
            const bool moves = e > place && e <= end;
            const T below = moves ? value[e - 1] : T(0);
            const Index index_below = moves ? index[e - 1] : -1;
            __syncwarp();
            if (moves) {
                value[e] = below;
                index[e] = index_below;
            }
        }
        if (lane == 0) {
            value[place] = x;
            index[place] = candidate;
        }
        __syncwarp();
    }
};

template <bool LONG, class T>
__device__ void merge_smallest(T* values, Index* index, const Index* rows, const T* found,
                               const Index* candidates, int nodes, int m, int c, int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Index item = Index(blockIdx.x) * warps + warp;
    if (item >= Index(nodes) * m) return;
    const Index row = rows[item];
    if (row < 0) return;
    values += row * count;
    index += row * count;
    List<T> list = {values, index, count};
    if constexpr (!LONG) {
        DYN_SHARED(shared);
        list.index = take<Index>(shared, warps * count) + warp * count;
        list.value = take<T>(shared, warps * count) + warp * count;
        for (int e = lane; e < count; e += 32) {
            list.value[e] = values[e];
            list.index[e] = index[e];
        }
        __syncwarp();
    }
    found += item * c;
    candidates += item / m * c;
    for (int first = 0; first < c; first += 32) {
        const int j = first + lane;
        const T x = j < c ? found[j] : T(0);
        const bool small = j < c && x <= list.value[count - 1] && x - x == T(0);  // and finite
        const Index candidate = small ? candidates[j] : -1;
        unsigned left = __ballot_sync(FULL_WARP, candidate >= 0 && candidate != row);
        while (left) {
            const int next = __ffs(int(left)) - 1;
            left &= left - 1;
            list.insert(__shfl_sync(FULL_WARP, x, next), __shfl_sync(FULL_WARP, candidate, next));
        }
    }
    for (int e = lane; e < count && !LONG; e += 32) {
        values[e] = list.value[e];
        index[e] = list.index[e];
    }
}

#define MERGE_SMALLEST(suffix, T)                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 4) merge_smallest_##suffix(                 \
        T* values, long long* index, const long long* rows, const T* found,                       \
        const long long* candidates, int nodes, int m, int c, int count) {                        \
        merge_smallest<false, T>(values, index, rows, found, candidates, nodes, m, c, count);     \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) merge_smallest_long_##suffix(            \
        T* values, long long* index, const long long* rows, const T* found,                       \
        const long long* candidates, int nodes, int m, int c, int count) {                        \
        merge_smallest<true, T>(values, index, rows, found, candidates, nodes, m, c, count);      \
    }
MERGE_SMALLEST(f32, float)
MERGE_SMALLEST(f64, double)
