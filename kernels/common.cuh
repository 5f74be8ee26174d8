// Shared by every kernel source; gpu_hodlr.kernel_sources inlines it. CUDA C++17, no includes.
#ifndef GPU_HODLR_COMMON_CUH
#define GPU_HODLR_COMMON_CUH

// Dynamic shared memory is the only kind used, as bytes: `take` carves it into arrays.
// The header that executes kernel sources on the host (tests/host_cuda) brings its own.
#ifndef DYN_SHARED
#define DYN_SHARED(name)                                                   \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
    unsigned char* name = dynamic_shared_memory
#endif

// Every warp-wide call names all 32 lanes: callers keep whole warps together.
#define FULL_WARP 0xffffffffu

typedef long long Index;  // int64, the index type of the batched contract; -1 is padding

// The next `count` values of a shared buffer. Take the types of larger alignment first.
template <class T>
__device__ __forceinline__ T* take(unsigned char*& buffer, int count) {
    T* const start = reinterpret_cast<T*>(buffer);
    buffer += sizeof(T) * count;
    return start;
}

__device__ __forceinline__ int thread_number() {
    return threadIdx.x + blockDim.x * threadIdx.y;
}

struct Sum {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Largest {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return b > a ? b : a;
    }
};

// The butterfly leaves the same bits in all lanes.
template <class Operation, class T>
__device__ __forceinline__ T warp_reduce(T value) {
    for (int offset = 16; offset > 0; offset /= 2)
        value = Operation()(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce<Sum>(value);
}

// Sums over the warp of V values a lane (V a power of two up to 32); they are overwritten. Lane l
// gets the sum of number l V / 32. Halves are exchanged: about V shuffles where V butterflies
// would take 5 V.
template <int V, int OFFSET = 16, class T>
__device__ __forceinline__ T warp_sums(T* values) {
    if constexpr (OFFSET == 0) {
        return values[0];
    } else {
        constexpr int half = V > 1 ? V / 2 : 1;
        const bool upper = V > 1 && (thread_number() & OFFSET);
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const T low = values[i], high = values[V - half + i];
            const T given = upper ? low : high;
            values[i] = (upper ? high : low) + __shfl_xor_sync(FULL_WARP, given, OFFSET);
        }
        return warp_sums<half, OFFSET / 2>(values);
    }
}

// Reduction over the block, the same bits in all threads; `scratch` holds 32 values, and a barrier
// must come before it is used again. 0 must be the identity: sums, the largest absolute value.
template <class Operation, class T>
__device__ T block_reduce(T value, T* scratch) {
    const int lane = thread_number() % 32, warp = thread_number() / 32;
    const int warps = blockDim.x * blockDim.y / 32;
    value = warp_reduce<Operation>(value);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_reduce<Operation>(lane < warps ? scratch[lane] : T(0));
}

// Of squared norms: values are scaled by powers of two up to this exponent, and a column whose
// scaled square is at most `negligible` counts as 0 (1 / (beta * head) must not overflow).
template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr int exponent = 120;
    static constexpr float negligible = 1e-34f;
};
template <>
struct Limits<double> {
    static constexpr int exponent = 1000;
    static constexpr double negligible = 1e-290;
};

#endif
