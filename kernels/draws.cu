// Columns drawn of cells in the order of their distance, a row after the other.
//
//   draw_chances      the chance of a column of every cell, of a row `wanted` in all: the multiple of
//                     its density (1 - anywhere) / k / their sum + anywhere / number, k the rank of
//                     the middle of the cell, or 1, of the nearest ones, where that would be more.
//                     count (rows, q): columns of each cell; chance alike
//   draw_systematic   slot k of a row goes to the first cell up to whose end the chances, as multiples
//                     of 2^-40, less start[row] are more than k, and to the column in it that they
//                     have come to: position and drawn, the cell's chance, (rows, wanted); -1 and 1
//                     where there is none.  first, count, chance (rows, q), start (rows,)
//
// Launch: rows blocks of 32 threads. No shared memory. A warp goes over the cells of its row, four
// times for the chances: q / 32 steps of a scan each. Integers int64, numbers double.
#include "common.cuh"

constexpr double ONE = 1099511627776.0;  // 2^40: a chance of 1, whose multiples are added up exactly

// Sums over this lane and those before, or behind it.
template <class T>
__device__ __forceinline__ T scan_before(T value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const int lane = threadIdx.x;
        const T other = __shfl_sync(FULL_WARP, value, (lane - offset) & 31);
        if (lane >= offset) value += other;
    }
    return value;
}

template <class T>
__device__ __forceinline__ T scan_behind(T value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const int lane = threadIdx.x;
        const T other = __shfl_sync(FULL_WARP, value, (lane + offset) & 31);
        if (lane + offset < 32) value += other;
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(32)
    draw_chances_f64(const long long* count, double* chance, double anywhere, int q,
                     long long wanted) {
    const int lane = threadIdx.x;
    count += Index(blockIdx.x) * q;
    chance += Index(blockIdx.x) * q;  // a lane reads what it wrote itself, and no other does
    Index number = 0;
    double total = 0;
    for (int i = lane; i - lane < q; i += 32) {
        const Index columns = i < q ? count[i] : 0, up_to = scan_before(columns);
        const double middle = double(number + up_to) - double(columns - 1) / 2;
        const double near = columns > 0 ? 1 / max(middle, 1.0) : 0.0;
        if (i < q) chance[i] = near;
        total += warp_sum(double(columns) * near);
        number += __shfl_sync(FULL_WARP, up_to, 31);
    }
    const double all = anywhere / max(double(number), 1.0);
    for (int i = lane; i < q; i += 32)
        chance[i] = count[i] > 0 ? (1 - anywhere) * chance[i] / max(total, 1e-300) + all : 0.0;

    // Of the nearest cells, as many are certain as would get more than the rest of all.
    int certain = q - 1;
    double left_there = 0, rest_there = 0, behind = 0;
    Index counted = 0;  // columns behind
    for (int begin = (q - 1) / 32 * 32; begin >= 0; begin -= 32) {
        const int i = begin + lane;
        const Index columns = i < q ? count[i] : 0;
        const double density = i < q ? chance[i] : 0.0;
        const Index farther = scan_behind(columns);
        const double rest = behind + scan_behind(double(columns) * density);
        const double left = double(wanted - (number - counted - farther));
        const unsigned enough = __ballot_sync(FULL_WARP, i < q && left * density <= rest);
        const bool last = begin + 32 >= q;
        if (enough || last) {
            const int at = enough ? __ffs(int(enough)) - 1 : q - 1 - begin;
            certain = begin + at;
            left_there = __shfl_sync(FULL_WARP, left, at);
            rest_there = __shfl_sync(FULL_WARP, rest, at);
        }
        behind = __shfl_sync(FULL_WARP, rest, 0);
        counted += __shfl_sync(FULL_WARP, farther, 0);
    }
    const double multiple = rest_there > 0 ? left_there / rest_there : 0.0;
    for (int i = lane; i < q; i += 32)
        chance[i] = i < certain ? 1.0 : min(1.0, multiple * chance[i]);
}

extern "C" __global__ void __launch_bounds__(32)
    draw_systematic_f64(const long long* first, const long long* count, const double* chance,
                        const double* start, long long* position, double* drawn, int q,
                        int wanted) {
    const int lane = threadIdx.x;
    const Index row = blockIdx.x;
    const double begin = start[row];
    position += row * wanted;
    drawn += row * wanted;
    Index end = 0, filled = 0;
    for (int i = lane; i - lane < q; i += 32) {
        const Index at = row * q + i;
        const double its = i < q ? chance[at] : 0.0;
        const Index columns = i < q ? count[at] : 0;
        const Index size = Index(rint(double(columns) * its * ONE));
        const Index scanned = scan_before(size), before = end + scanned - size;
        const double slots = ceil(double(end + scanned) / ONE - begin);
        const Index up_to = Index(max(min(slots, double(wanted)), 0.0));
        const Index left = __shfl_sync(FULL_WARP, up_to, (lane - 1) & 31);
        for (Index k = lane ? left : filled; k < up_to; ++k) {
            const Index local = Index((begin + double(k) - double(before) / ONE) / its);
            position[k] = first[at] + min(max(local, Index(0)), columns - 1);
            drawn[k] = its;
        }
        filled = __shfl_sync(FULL_WARP, up_to, 31);
        end += __shfl_sync(FULL_WARP, scanned, 31);
    }
    for (Index k = filled + lane; k < wanted; k += 32) {
        position[k] = -1;
        drawn[k] = 1;
    }
}
