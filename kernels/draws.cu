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
// Launch: rows blocks of 32, 64, ... or 512 threads, 656 bytes of shared memory. A block goes over the
// cells of its row, as many at a time as it has threads, two times with scans for the chances. Integers
// int64, numbers double.
#include "common.cuh"

constexpr double ONE = 1099511627776.0;  // 2^40: a chance of 1, whose multiples are added up exactly

template <class T>
struct Scan {
    T mine;   // the sum over this thread and those before it, or behind it
    T total;  // over all of the block
};

template <bool BEHIND, class T>
__device__ Scan<T> block_scan(T value, T* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        const int from = BEHIND ? lane + offset : lane - offset;
        const T other = __shfl_sync(FULL_WARP, value, from & 31);
        if (from >= 0 && from < 32) value += other;
    }
    __syncthreads();  // the sums of the scan before have been read
    if (lane == (BEHIND ? 0 : 31)) sums[warp] = value;
    __syncthreads();
    T total = 0, others = 0;
    for (int w = 0; w < warps; ++w) {
        const T part = sums[w];
        if (BEHIND ? w > warp : w < warp) others += part;
        total += part;
    }
    return {value + others, total};
}

extern "C" __global__ void __launch_bounds__(512)
    draw_chances_f64(const long long* count, double* chance, double anywhere, int q,
                     long long wanted) {
    DYN_SHARED(shared);
    double* const sums = take<double>(shared, 32);
    double* const there = take<double>(shared, 2);
    Index* const counts = take<Index>(shared, 32);
    int* const places = take<int>(shared, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int step = blockDim.x;
    count += Index(blockIdx.x) * q;
    chance += Index(blockIdx.x) * q;  // a thread reads what it wrote itself, and no other does
    Index number = 0;
    double total = 0;
    for (int begin = 0; begin < q; begin += step) {
        const int i = begin + threadIdx.x;
        const Index columns = i < q ? count[i] : 0;
        const Scan<Index> up_to = block_scan<false>(columns, counts);
        const double middle = double(number + up_to.mine) - double(columns - 1) / 2;
        const double near = columns > 0 ? 1 / max(middle, 1.0) : 0.0;
        if (i < q) chance[i] = near;
        total += block_scan<false>(double(columns) * near, sums).total;
        number += up_to.total;
    }
    const double all = anywhere / max(double(number), 1.0);
    for (int i = threadIdx.x; i < q; i += step)
        chance[i] = count[i] > 0 ? (1 - anywhere) * chance[i] / max(total, 1e-300) + all : 0.0;

    // Of the nearest cells, as many are certain as would get more than the rest of all.
    int certain = q - 1;
    double behind = 0;
    Index counted = 0;  // columns behind
    for (int begin = (q - 1) / step * step; begin >= 0; begin -= step) {
        const int i = begin + threadIdx.x;
        const Index columns = i < q ? count[i] : 0;
        const double density = i < q ? chance[i] : 0.0;
        const Scan<Index> farther = block_scan<true>(columns, counts);
        const Scan<double> rest = block_scan<true>(double(columns) * density, sums);
        const double left = double(wanted - (number - counted - farther.mine));
        const bool enough = i < q && left * density <= behind + rest.mine;
        const unsigned votes = __ballot_sync(FULL_WARP, enough);
        if (lane == 0) places[warp] = votes ? begin + 32 * warp + __ffs(int(votes)) - 1 : q;
        __syncthreads();
        int lowest = q;
        for (int w = 0; w < warps; ++w) lowest = min(lowest, places[w]);
        if (lowest == q && begin + step >= q) lowest = q - 1;
        if (lowest < q) certain = lowest;
        if (i == lowest) {
            there[0] = left;
            there[1] = behind + rest.mine;
        }
        behind += rest.total;
        counted += farther.total;
    }
    __syncthreads();
    const double multiple = there[1] > 0 ? there[0] / there[1] : 0.0;
    for (int i = threadIdx.x; i < q; i += step)
        chance[i] = i < certain ? 1.0 : min(1.0, multiple * chance[i]);
}

// Slots up to the end of a cell, whose chances and those before it add up to so many multiples.
__device__ __forceinline__ Index slots_up_to(Index end, double start, int wanted) {
    return Index(max(min(ceil(double(end) / ONE - start), double(wanted)), 0.0));
}

extern "C" __global__ void __launch_bounds__(512)
    draw_systematic_f64(const long long* first, const long long* count, const double* chance,
                        const double* start, long long* position, double* drawn, int q,
                        int wanted) {
    DYN_SHARED(shared);
    Index* const counts = take<Index>(shared, 32);
    const Index row = blockIdx.x;
    const int step = blockDim.x;
    position += row * wanted;
    drawn += row * wanted;
    Index end = 0;
    for (int begin = 0; begin < q; begin += step) {
        const int i = begin + threadIdx.x;
        const Index at = row * q + i;
        const double its = i < q ? chance[at] : 0.0;
        const Index columns = i < q ? count[at] : 0;
        const Index size = Index(rint(double(columns) * its * ONE));
        const Scan<Index> scanned = block_scan<false>(size, counts);
        const Index before = end + scanned.mine - size;
        const Index stop = slots_up_to(before + size, start[row], wanted);
        for (Index k = slots_up_to(before, start[row], wanted); k < stop; ++k) {
            const Index local = Index((start[row] + double(k) - double(before) / ONE) / its);
            position[k] = first[at] + min(max(local, Index(0)), columns - 1);
            drawn[k] = its;
        }
        end += scanned.total;
    }
    for (Index k = slots_up_to(end, start[row], wanted) + threadIdx.x; k < wanted; k += step) {
        position[k] = -1;
        drawn[k] = 1;
    }
}
