// Blocks of a Khatri-Rao Gram matrix: K[i, j] = sum_q X[f(i), q] X[f(j), q] G[u(i), u(j), q].
// For the Gauss-Newton matrix: f the input a weight multiplies, u its unit, q the sample.
//
//   features    X (num_features, n)
//   row_feature (nodes, m), col_feature (nodes, k): f of the block's indices, -1 for padding
//   row_slot    (nodes, m), col_slot (nodes, k): u of them, numbered 0 .. slots - 1
//   row_of      (slots, slots): the row of `gram` with G[u, v], -1 where it is 0
//   gram        (any number, n): the rows of G in play
//   out         (nodes, m, k): 0 in the rows and columns of padding
//
// Launch: nodes ceil(m / 32) ceil(k / 32) blocks of (16, 16) threads, one tile of 32 x 32 entries
// each, 2 x 2 a thread. Shared memory: 1032 + 5184 sizeof(T) bytes.
//
// G is staged once for each pair of distinct units in the tile, not for each pair of indices:
// neighbours mostly share a unit. The fewer the pairs, the more samples fit at a time.
#include "common.cuh"

constexpr int TILE = 32;
constexpr int HALF = TILE / 2;
constexpr int DEPTH = 16;         // samples staged at a time, at most
constexpr int PITCH = DEPTH + 1;  // odd, against bank conflicts
constexpr int GRAM_SIZE = 4096;   // values; at least 4 for each of 32 x 32 pairs

template <class T>
__device__ void khatri_rao_entries(const T* features, const Index* row_feature,
                                   const Index* row_slot, const Index* col_feature,
                                   const Index* col_slot, const Index* row_of, const T* gram,
                                   T* out, int m, int k, int n, int slots) {
    const int col_tiles = (k + TILE - 1) / TILE, row_tiles = (m + TILE - 1) / TILE;
    const int first_col = blockIdx.x % col_tiles * TILE;
    const int first_row = blockIdx.x / col_tiles % row_tiles * TILE;
    const Index node = blockIdx.x / col_tiles / row_tiles;

    DYN_SHARED(shared);
    // Of the tile's rows, then of its columns:
    Index* const feature = take<Index>(shared, 2 * TILE);  // f, or -1
    T* const x = take<T>(shared, 2 * TILE * PITCH);        // X[f] at the samples staged
    T* const g = take<T>(shared, GRAM_SIZE);               // G of pairs of units
    int* const unit = take<int>(shared, 2 * TILE);         // its number among the tile's units
    int* const slot = take<int>(shared, 2 * TILE);         // of a unit by that number, or -1
    int* const units = take<int>(shared, 2);               // how many there are

    const int number = thread_number(), lane = number % 32, side = number / 32;
    if (side < 2) {  // warp 0 numbers the units of the rows, warp 1 those of the columns
        const int i = (side == 0 ? first_row : first_col) + lane;
        Index mine = -1;
        int place = -1;
        if (side == 0 && i < m) {
            mine = row_feature[node * m + i];
            place = mine < 0 ? -1 : int(row_slot[node * m + i]);
        }
        if (side == 1 && i < k) {
            mine = col_feature[node * k + i];
            place = mine < 0 ? -1 : int(col_slot[node * k + i]);
        }
        const int leader = __ffs(__match_any_sync(FULL_WARP, place)) - 1;
        const unsigned leaders = __ballot_sync(FULL_WARP, lane == leader);
        const int which = __popc(leaders & ((1u << leader) - 1));
        feature[number] = mine;
        unit[number] = which;
        if (lane == leader) slot[side * TILE + which] = place;
        if (lane == 0) units[side] = __popc(leaders);
    }
    __syncthreads();

    const int pairs = units[0] * units[1], col_units = units[1];
    const int depth = min(DEPTH, GRAM_SIZE / pairs - 1), pitch = depth + 1;
    const T* const row_0 = x + threadIdx.y * PITCH;
    const T* const row_1 = row_0 + HALF * PITCH;
    const T* const col_0 = x + (TILE + threadIdx.x) * PITCH;
    const T* const col_1 = col_0 + HALF * PITCH;
    const T* const g_0 = g + unit[threadIdx.y] * col_units * pitch;
    const T* const g_1 = g + unit[threadIdx.y + HALF] * col_units * pitch;
    const int u_0 = unit[TILE + threadIdx.x] * pitch;
    const int u_1 = unit[TILE + threadIdx.x + HALF] * pitch;
    T sum_00 = 0, sum_01 = 0, sum_10 = 0, sum_11 = 0;

    for (int first = 0; first < n; first += depth) {
        const int width = min(depth, n - first);
        const int q = threadIdx.x;  // consecutive threads read consecutive samples
        if (q < width) {
            for (int p = threadIdx.y; p < 2 * TILE; p += HALF)
                x[p * PITCH + q] = feature[p] < 0 ? T(0) : features[feature[p] * n + first + q];
            for (int p = threadIdx.y; p < pairs; p += HALF) {
                const int u = slot[p / col_units], v = slot[TILE + p % col_units];
                const Index row = u < 0 || v < 0 ? -1 : row_of[Index(u) * slots + v];
                g[p * pitch + q] = row < 0 ? T(0) : gram[row * n + first + q];
            }
        }
        __syncthreads();
        for (int i = 0; i < width; ++i) {
            sum_00 += row_0[i] * (col_0[i] * g_0[u_0 + i]);
            sum_01 += row_0[i] * (col_1[i] * g_0[u_1 + i]);
            sum_10 += row_1[i] * (col_0[i] * g_1[u_0 + i]);
            sum_11 += row_1[i] * (col_1[i] * g_1[u_1 + i]);
        }
        __syncthreads();
    }

    const int row = first_row + threadIdx.y, col = first_col + threadIdx.x;
    T* const target = out + (node * m + row) * k + col;
    if (row < m && col < k) target[0] = sum_00;
    if (row < m && col + HALF < k) target[HALF] = sum_01;
    if (row + HALF < m && col < k) target[Index(HALF) * k] = sum_10;
    if (row + HALF < m && col + HALF < k) target[Index(HALF) * k + HALF] = sum_11;
}

#define KHATRI_RAO_ENTRIES(name, T)                                                              \
    extern "C" __global__ void __launch_bounds__(256, 4)                                         \
        name(const T* features, const long long* row_feature, const long long* row_slot,         \
             const long long* col_feature, const long long* col_slot, const long long* row_of,   \
             const T* gram, T* out, int m, int k, int n, int slots) {                            \
        khatri_rao_entries<T>(features, row_feature, row_slot, col_feature, col_slot, row_of,    \
                              gram, out, m, k, n, slots);                                        \
    }
KHATRI_RAO_ENTRIES(khatri_rao_entries_f32, float)
KHATRI_RAO_ENTRIES(khatri_rao_entries_f64, double)
