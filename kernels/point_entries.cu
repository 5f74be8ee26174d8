// Blocks of a kernel matrix of points: variance k(|x_i - x_j|) + nugget_i [i = j].
//
//   gaussian exp(-r^2 / 2)                      laplace  exp(-r)
//   matern32 (1 + sqrt(3) r) exp(-sqrt(3) r)    matern52 (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)
//   rational_quadratic (1 + r^2 / (2 alpha))^-alpha, alpha the parameter
//   spherical (1 - r)^2 (1 + r / 2) for r < 1, else 0            squared_distance  r^2
//   Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 4.2; the
//   spherical one: Chiles and Delfiner, Geostatistics (2012), section 2.5.1.
//
//   points (N, d), in units of the length scale;  nugget (N,) with stride 1, or (1,) with stride 0
//   rows (nodes, m), cols (nodes, k): indices, -1 for padding
//   out    (nodes, m, k): 0 in the rows and columns of padding
//
// Launch: nodes ceil(m / 32) ceil(k / 32) blocks of (32, 8) threads, one tile of 32 x 32 entries
// each, 4 entries a thread. Shared memory: 512 + 1088 sizeof(T) bytes.
#include "common.cuh"

constexpr int TILE = 32;
constexpr int DEPTH = 16;          // coordinates staged at a time
constexpr int PITCH = DEPTH + 1;   // odd: the 32 points of a warp lie in 32 banks
constexpr int ENTRIES = TILE / 8;  // a thread

struct Gaussian {
    template <class T>
    __device__ static T value(T r, T) {
        return exp(T(-0.5) * r * r);
    }
};
struct Laplace {
    template <class T>
    __device__ static T value(T r, T) {
        return exp(-r);
    }
};
struct Matern32 {
    template <class T>
    __device__ static T value(T r, T) {
        r *= T(1.7320508075688772);
        return (T(1) + r) * exp(-r);
    }
};
struct Matern52 {
    template <class T>
    __device__ static T value(T r, T) {
        r *= T(2.23606797749979);
        return (T(1) + r + r * r / T(3)) * exp(-r);
    }
};
struct RationalQuadratic {
    template <class T>
    __device__ static T value(T r, T parameter) {
        return exp(-parameter * log1p(r * r / (T(2) * parameter)));
    }
};
struct Spherical {
    template <class T>
    __device__ static T value(T r, T) {
        const T inside = max(T(1) - r, T(0));
        return inside * inside * (T(1) + T(0.5) * r);
    }
};
struct SquaredDistance {
    template <class T>
    __device__ static T value(T r, T) {
        return r * r;
    }
};

template <class Profile, class T>
__device__ void point_entries(const T* points, const Index* rows, const Index* cols, T* out,
                              int m, int k, int d, T parameter, T variance, const T* nugget,
                              int stride) {
    const int col_tiles = (k + TILE - 1) / TILE, row_tiles = (m + TILE - 1) / TILE;
    const int first_col = blockIdx.x % col_tiles * TILE;
    const int first_row = blockIdx.x / col_tiles % row_tiles * TILE;
    const Index node = blockIdx.x / col_tiles / row_tiles;

    DYN_SHARED(shared);
    Index* const index = take<Index>(shared, 2 * TILE);  // of the tile's rows, then its columns
    T* const x = take<T>(shared, 2 * TILE * PITCH);      // their coordinates, in the same order
    const T* const y = x + (TILE + threadIdx.x) * PITCH;

    const int number = thread_number();
    if (number < 2 * TILE) {
        const bool is_row = number < TILE;
        const int i = is_row ? first_row + number : first_col + number - TILE;
        index[number] = -1;
        if (is_row && i < m) index[number] = rows[node * m + i];
        if (!is_row && i < k) index[number] = cols[node * k + i];
    }
    __syncthreads();

    T squared[ENTRIES] = {};
    for (int first = 0; first < d; first += DEPTH) {
        const int depth = min(DEPTH, d - first);
        for (int e = number; e < 2 * TILE * depth; e += 8 * TILE) {
            const int point = e / depth, c = e % depth;
            if (index[point] >= 0) x[point * PITCH + c] = points[index[point] * d + first + c];
            else x[point * PITCH + c] = 0;
        }
        __syncthreads();
        for (int c = 0; c < depth; ++c)
            for (int q = 0; q < ENTRIES; ++q) {
                // Differences, never |x|^2 + |y|^2 - 2 x y: close points must not cancel.
                const T difference = x[(threadIdx.y + 8 * q) * PITCH + c] - y[c];
                squared[q] += difference * difference;
            }
        __syncthreads();
    }

    const int col = first_col + threadIdx.x;
    const Index j = index[TILE + threadIdx.x];
    for (int q = 0; q < ENTRIES; ++q) {
        const int slot = threadIdx.y + 8 * q, row = first_row + slot;
        const Index i = index[slot];
        if (row >= m || col >= k) continue;
        T entry = 0;
        if (i >= 0 && j >= 0) {
            entry = variance * Profile::value(sqrt(squared[q]), parameter);
            if (i == j) entry += nugget[i * stride];
        }
        out[(node * m + row) * k + col] = entry;
    }
}

#define POINT_ENTRIES(name, Profile, T)                                                          \
    extern "C" __global__ void __launch_bounds__(256, 4)                                         \
        name(const T* points, const long long* rows, const long long* cols, T* out, int m,       \
             int k, int d, T parameter, T variance, const T* nugget, int stride) {               \
        point_entries<Profile, T>(points, rows, cols, out, m, k, d, parameter, variance, nugget, \
                                  stride);                                                       \
    }
POINT_ENTRIES(point_entries_gaussian_f32, Gaussian, float)
POINT_ENTRIES(point_entries_gaussian_f64, Gaussian, double)
POINT_ENTRIES(point_entries_laplace_f32, Laplace, float)
POINT_ENTRIES(point_entries_laplace_f64, Laplace, double)
POINT_ENTRIES(point_entries_matern32_f32, Matern32, float)
POINT_ENTRIES(point_entries_matern32_f64, Matern32, double)
POINT_ENTRIES(point_entries_matern52_f32, Matern52, float)
POINT_ENTRIES(point_entries_matern52_f64, Matern52, double)
POINT_ENTRIES(point_entries_rational_quadratic_f32, RationalQuadratic, float)
POINT_ENTRIES(point_entries_rational_quadratic_f64, RationalQuadratic, double)
POINT_ENTRIES(point_entries_spherical_f32, Spherical, float)
POINT_ENTRIES(point_entries_spherical_f64, Spherical, double)
POINT_ENTRIES(point_entries_squared_distance_f32, SquaredDistance, float)
POINT_ENTRIES(point_entries_squared_distance_f64, SquaredDistance, double)
