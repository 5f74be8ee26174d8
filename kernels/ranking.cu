// Cells of a tree, looked at from block rows: how far each is, and which are divided.
//
//   examine_cells   of cell[t, i], -1 for none: first position, the columns of row t in it (held),
//                   and the distance of its box from the row's, `none` where it holds none, -1
//                   where it holds others' as well: cell, first, held, distance (rows, q)
//   divide_cells    the first `split` in the order of row t give 2 c and 2 c + 1, or -1 where they
//                   hold nothing, to next (rows, 2 split); first, held and distance of the others
//                   go to the columns from `at` on of arrays (rows, width)
//
//   offsets (cells + 1,) first positions; low, high (cells, d) and row_low, row_high (rows, d) boxes;
//   run (rows, 2) positions of a row's columns, but for its nodes `without` (rows, left_out), whose
//   first positions and sizes these are.  All integers int64.
//
// Launch: 256 threads, a cell each, `count` in all. No shared memory. Small: most is the launch.
#include "common.cuh"

constexpr double BY_CENTER = 1e-3;  // of the squared distance of centers: it orders cells that touch

template <class T>
struct Farthest;
template <>
struct Farthest<float> {
    static constexpr float finite = 3.402823466e38f;
};
template <>
struct Farthest<double> {
    static constexpr double finite = 1.7976931348623157e308;
};

// How many columns of a row there are before a position.
__device__ __forceinline__ Index columns_before(Index position, Index begin, Index end,
                                                const Index* left, const Index* size,
                                                int left_out) {
    Index before = min(max(position, begin), end) - begin;
    for (int q = 0; q < left_out; ++q) before -= min(max(position - left[q], Index(0)), size[q]);
    return before;
}

template <class T>
__device__ void examine_cells(const Index* cell, const Index* offsets, const T* low, const T* high,
                              const T* row_low, const T* row_high, const Index* run,
                              const Index* left, const Index* size, Index* first, Index* held,
                              T* distance, T none, int q, int d, int left_out, Index count) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const Index row = item / q, mine = cell[item] < 0 ? 0 : cell[item];
    const Index start = offsets[mine], stop = cell[item] < 0 ? start : offsets[mine + 1];
    left += row * left_out;
    size += row * left_out;
    const Index begin = run[2 * row], end = run[2 * row + 1];
    const Index columns = columns_before(stop, begin, end, left, size, left_out) -
                          columns_before(start, begin, end, left, size, left_out);
    T squares = 0;
    for (int x = 0; x < d; ++x) {
        const T below = row_low[row * d + x], above = row_high[row * d + x];
        const T its_below = low[mine * d + x], its_above = high[mine * d + x];
        const T gap = max(max(its_below - above, below - its_above), T(0));
        const T centers = (its_below + its_above - below - above) / 2;
        squares += gap * gap + T(BY_CENTER) * centers * centers;
    }
    if (!(squares - squares == 0)) squares = Farthest<T>::finite;  // of empty nodes' infinite boxes
    if (columns > 0 && columns < stop - start) squares = -1;
    first[item] = start;
    held[item] = columns;
    distance[item] = columns > 0 ? squares : none;
}

template <class T>
__device__ void divide_cells(const Index* order, const Index* cell, const Index* first,
                             const Index* held, const T* distance, Index* next, Index* kept_first,
                             Index* kept_held, T* kept_distance, int q, int split, int at,
                             int width, Index count) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const Index row = item / q, from = row * q + order[item];
    const int place = int(item % q);
    if (place < split) {
        const Index mine = held[from] > 0 ? cell[from] : -1;
        Index* const to = next + (row * split + place) * 2;
        to[0] = mine < 0 ? -1 : 2 * mine;
        to[1] = mine < 0 ? -1 : 2 * mine + 1;
    } else {
        const Index to = row * width + at + place - split;
        kept_first[to] = first[from];
        kept_held[to] = held[from];
        kept_distance[to] = distance[from];
    }
}

#define RANKING(suffix, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) examine_cells_##suffix(                     \
        const long long* cell, const long long* offsets, const T* low, const T* high,             \
        const T* row_low, const T* row_high, const long long* run, const long long* left,         \
        const long long* size, long long* first, long long* held, T* distance, T none, int q,     \
        int d, int left_out, long long count) {                                                   \
        examine_cells<T>(cell, offsets, low, high, row_low, row_high, run, left, size, first,     \
                         held, distance, none, q, d, left_out, count);                            \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) divide_cells_##suffix(                      \
        const long long* order, const long long* cell, const long long* first,                    \
        const long long* held, const T* distance, long long* next, long long* kept_first,         \
        long long* kept_held, T* kept_distance, int q, int split, int at, int width,              \
        long long count) {                                                                        \
        divide_cells<T>(order, cell, first, held, distance, next, kept_first, kept_held,          \
                        kept_distance, q, split, at, width, count);                               \
    }
RANKING(f32, float)
RANKING(f64, double)
