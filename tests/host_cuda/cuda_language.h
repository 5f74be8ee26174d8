// The words of CUDA C++ that the kernels use, on top of host_cuda.h, which executes them.
#pragma once

#include "host_cuda.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (::host_cuda::thread_index())
#define blockIdx (::host_cuda::block_index())
#define blockDim (::host_cuda::block_dimensions())
#define gridDim (::host_cuda::grid_dimensions())
#define DYN_SHARED(name) unsigned char* name = ::host_cuda::shared_memory()

// Barriers are numbered in the order of the source, so that a test can take one out.
constexpr int host_cuda_first_site = __COUNTER__ + 1;
#define __syncthreads() ::host_cuda::barrier(__COUNTER__ - host_cuda_first_site)
#define __syncwarp(...) \
    ::host_cuda::warp_barrier(__COUNTER__ - host_cuda_first_site __VA_OPT__(, ) __VA_ARGS__)

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return host_cuda::shuffle(mask, value, unsigned(source));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return host_cuda::shuffle(mask, value, host_cuda::lane() ^ unsigned(bits));
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    return host_cuda::lanes_with(
        1, host_cuda::warp_call(mask, host_cuda::WarpCall::kBallot, vote != 0));
}
inline unsigned __match_any_sync(unsigned mask, int value) {
    return host_cuda::lanes_with(
        unsigned(value), host_cuda::warp_call(mask, host_cuda::WarpCall::kMatch, unsigned(value)));
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T cospi(T x) {
    return std::cos(T(3.141592653589793) * x);
}
template <class T>
T sinpi(T x) {
    return std::sin(T(3.141592653589793) * x);
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// The overloads for float: the C names alone would go by way of double.
using std::copysign;
using std::exp;
using std::fabs;
using std::ilogb;
using std::log;
using std::max;
using std::min;
using std::scalbn;
using std::sqrt;
