// One level of a solve with a ULV factor, few right-hand sides: all of a node by one thread block.
//
//   eliminate   y = L^-1 (x2 - T x1), w = x1 - W^T y, where x1 are the first r of the node's rows
//               of x and x2 the others
//   substitute  z = L^-T (y - W w); the node's rows of x become [w - T^T z; z]
//
//   T, W (nodes, rows - r, r), L (nodes, rows - r, rows - r) by rows, lower;  index (nodes, rows)
//   x: of node t row i is at index[t, i] + step t, where index is -1 it is 0, or not written
//   y (nodes, rows - r, k <= 8), w (nodes, r, k)
//
// Launch: eliminate_f32_K, substitute_f32_K, K = 1, 2, 4 or 8 the least that holds k; nodes blocks
// of 64, 96, ... or 512 threads. Shared memory: sizeof(T) times
// 4224 + 32 K (ceil(r / 32) + ceil((rows - r) / 32)) bytes.
//
// One launch where there were seven, that waited for each other: a block reads the node's T, L and
// W once. A node of a level with few is read by one multiprocessor, about a hundredth of the GPU's
// bandwidth: for matrices that take longer than launches, the caller takes other ways there.
#include "common.cuh"
#include "triangular_solves.cuh"
#include "shared_products.cuh"

// The node's vectors in shared memory: w of the skeleton, s.x of the other rows.
template <int K, class T>
struct Node {
    Shared<K, T> s;
    T* w;
    int r, rest;

    __device__ __forceinline__ Node(unsigned char* shared, int rows, int r_)
        : r(r_), rest(rows - r_) {
        s.tiles = take<T>(shared, 4 * TILE_SIZE);
        s.x = take<T>(shared, K * BLOCK * ((rest + BLOCK - 1) / BLOCK));
        w = take<T>(shared, K * BLOCK * ((r + BLOCK - 1) / BLOCK));
    }

    // s.x <- L^-1 (s.x - A w), or with L^-T;  w -= B^T s.x
    template <bool TRANSPOSE>
    __device__ __forceinline__ void solve(const T* a, const T* lower, const T* b) {
        __syncthreads();
        subtract_rows<K>(s.x, a, rest, r, w);
        solve_staged<K, TRANSPOSE>(s, lower, rest);
        subtract_columns<K>(w, b, rest, r, s.x, s.tiles);
    }
};

template <int K, class T>
__device__ void eliminate(const T* basis, const T* lower, const T* coupling, const T* x,
                          const Index* index, T* y, T* w, int rows, int r, int k, int step) {
    DYN_SHARED(shared);
    Node<K, T> node(shared, rows, r);
    const Index t = blockIdx.x, rest = node.rest;
    x += t * step * k;
    index += t * rows;
    load_rows<K>(node.w, x, index, r, k);
    load_rows<K>(node.s.x, x, index + r, node.rest, k);
    node.template solve<false>(basis + t * rest * r, lower + t * rest * rest,
                               coupling + t * rest * r);
    store_rows<K>(y + t * rest * k, node.s.x, nullptr, node.rest, k);
    store_rows<K>(w + t * r * k, node.w, nullptr, r, k);
}

template <int K, class T>
__device__ void substitute(const T* basis, const T* lower, const T* coupling, const T* y,
                           const T* w, const Index* index, T* x, int rows, int r, int k,
                           int step) {
    DYN_SHARED(shared);
    Node<K, T> node(shared, rows, r);
    const Index t = blockIdx.x, rest = node.rest;
    load_rows<K>(node.w, w + t * r * k, nullptr, r, k);
    load_rows<K>(node.s.x, y + t * rest * k, nullptr, node.rest, k);
    node.template solve<true>(coupling + t * rest * r, lower + t * rest * rest,
                              basis + t * rest * r);
    x += t * step * k;
    index += t * rows;
    store_rows<K>(x, node.w, index, r, k);
    store_rows<K>(x, node.s.x, index + r, node.rest, k);
}

#define ULV_STEPS(suffix, T, K)                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1) eliminate_##suffix##_##K(               \
        const T* basis, const T* lower, const T* coupling, const T* x, const long long* index,   \
        T* y, T* w, int rows, int r, int k, int step) {                                          \
        eliminate<K, T>(basis, lower, coupling, x, index, y, w, rows, r, k, step);               \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1) substitute_##suffix##_##K(              \
        const T* basis, const T* lower, const T* coupling, const T* y, const T* w,               \
        const long long* index, T* x, int rows, int r, int k, int step) {                        \
        substitute<K, T>(basis, lower, coupling, y, w, index, x, rows, r, k, step);              \
    }
ULV_STEPS(f32, float, 1)
ULV_STEPS(f32, float, 2)
ULV_STEPS(f32, float, 4)
ULV_STEPS(f32, float, 8)
ULV_STEPS(f64, double, 1)
ULV_STEPS(f64, double, 2)
ULV_STEPS(f64, double, 4)
ULV_STEPS(f64, double, 8)
