// What is around the pivoted Cholesky factorization of Gram matrices, see blocked_id.py: a stack's
// scale before, and what a round leaves and how exactly after it.
//
//   sample_powers   down[t] = 2^-e, up[t] = 2^e for e the exponent of the largest absolute value of
//                   samples[t], within 2^-1000 .. 2^1000; 1 where that is 0 or a value not finite.
//                   samples (nodes, length)
//   scaled_samples  out = samples down[t], double
//   round_limits    unknown = rounding energy[t], what is no more than that is rounding; exact, where
//                   it is not above enough[t]; stop = enough[t] there, reach energy[t] elsewhere
//   round_tails     left = energy[t] less the sum of squares[t], 0 where that is no more than
//                   unknown[t]; tails[t, i] = left and the squares from i on.
//                   squares (nodes, k), tails (nodes, k + 1)
//   round_seen      done[t] += ranks[t]; seen = whether all are exact, whether all are exact or have
//                   `most` rows, the largest of ranks
//
// Launch: sample_powers nodes blocks of 1024 threads, 256 bytes of shared memory twice; scaled_samples
// and round_limits 256 threads, a number each; round_tails nodes blocks of 32 threads; round_seen one
// block of 32 threads.
#include "common.cuh"

template <class T>
__device__ void sample_powers(const T* samples, double* down, double* up, Index length) {
    DYN_SHARED(shared);
    double* const first = take<double>(shared, 32);
    double* const second = take<double>(shared, 32);
    samples += Index(blockIdx.x) * length;
    double largest = 0, odd = 0;  // 0 of finite values alone
    for (Index i = threadIdx.x; i < length; i += blockDim.x) {
        const double value = samples[i];
        largest = max(largest, fabs(value));
        odd += value - value;
    }
    largest = block_reduce<Largest>(largest, first);
    odd = block_reduce<Sum>(odd, second);
    if (threadIdx.x > 0) return;
    const int power = largest > 0 && odd == 0 ? max(-1000, min(1000, ilogb(largest))) : 0;
    down[blockIdx.x] = scalbn(1.0, -power);
    up[blockIdx.x] = scalbn(1.0, power);
}

template <class T>
__device__ void scaled_samples(const T* samples, const double* down, double* out, Index length,
                               Index count) {
    const Index item = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item < count) out[item] = double(samples[item]) * down[item / length];
}

extern "C" __global__ void __launch_bounds__(256)
    round_limits_f64(const double* energy, const double* enough, double* unknown, double* stop,
                     unsigned char* exact, double rounding, double reach, long long count) {
    const Index t = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (t >= count) return;
    const double lost = rounding * energy[t];
    const bool is_exact = !(lost > enough[t]);  // written so that a NaN is left at that
    unknown[t] = lost;
    exact[t] = is_exact;
    stop[t] = is_exact ? enough[t] : reach * energy[t];
}

extern "C" __global__ void __launch_bounds__(32)
    round_tails_f64(const double* energy, const double* unknown, const double* squares,
                    double* left, double* tails, int k) {
    const Index node = blockIdx.x;
    const int lane = threadIdx.x;
    squares += node * k;
    tails += node * (k + 1);
    double sum = 0;
    for (int i = lane; i < k; i += 32) sum += squares[i];
    sum = warp_sum(sum);
    double rest = energy[node] - sum;
    if (rest <= unknown[node] && energy[node] - energy[node] == 0) rest = 0;
    if (lane == 0) {
        left[node] = rest;
        tails[k] = rest;
    }
    // From the end, so that nothing cancels: every sum is of terms >= 0.
    double behind = 0;
    for (int end = k; end > 0; end -= 32) {
        const int i = end - 1 - lane;
        double part = i >= 0 ? squares[i] : 0.0;
        for (int offset = 1; offset < 32; offset *= 2) {
            const double other = __shfl_sync(FULL_WARP, part, (lane - offset) & 31);
            if (lane >= offset) part += other;
        }
        if (i >= 0) tails[i] = behind + part + rest;
        behind += __shfl_sync(FULL_WARP, part, 31);
    }
}

extern "C" __global__ void __launch_bounds__(32)
    round_seen_f64(const unsigned char* exact, const long long* ranks, long long* done,
                   long long* seen, long long most, long long nodes) {
    bool all_exact = true, all_ended = true;
    Index width = 0;
    for (Index t = threadIdx.x; t < nodes; t += 32) {
        done[t] += ranks[t];
        all_exact = all_exact && exact[t];
        all_ended = all_ended && (exact[t] || done[t] >= most);
        width = max(width, ranks[t]);
    }
    const unsigned inexact = __ballot_sync(FULL_WARP, !all_exact);
    const unsigned open = __ballot_sync(FULL_WARP, !all_ended);
    width = warp_reduce<Largest>(width);
    if (threadIdx.x > 0) return;
    seen[0] = inexact == 0;
    seen[1] = open == 0;
    seen[2] = width;
}

#define GRAM_ROUNDS(suffix, T)                                                                    \
    extern "C" __global__ void __launch_bounds__(1024) sample_powers_##suffix(                    \
        const T* samples, double* down, double* up, long long length) {                           \
        sample_powers<T>(samples, down, up, length);                                              \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) scaled_samples_##suffix(                    \
        const T* samples, const double* down, double* out, long long length, long long count) {   \
        scaled_samples<T>(samples, down, out, length, count);                                     \
    }
GRAM_ROUNDS(f32, float)
GRAM_ROUNDS(f64, double)
