// Standard normal numbers that depend on the seed and their place alone, not on the GPU.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC11);
// Box and Muller, Ann. Math. Statist. 29 (1958).
//
//   out  count numbers: those at first, first + 1, ... of the seed's sequence; first is even
//
// Launch: any number of blocks of 256 threads, which walk over pairs of numbers.
#include "common.cuh"

struct Philox {
    unsigned word[4];

    // The random words of a counter.
    __device__ __forceinline__ Philox(unsigned long long counter, unsigned long long seed)
        : word{unsigned(counter), unsigned(counter >> 32), 0, 0} {
        unsigned low = unsigned(seed), high = unsigned(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const unsigned long long a = 0xD2511F53ull * word[0], b = 0xCD9E8D57ull * word[2];
            const unsigned next[4] = {unsigned(b >> 32) ^ word[1] ^ low, unsigned(b),
                                      unsigned(a >> 32) ^ word[3] ^ high, unsigned(a)};
            for (int i = 0; i < 4; ++i) word[i] = next[i];
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
    }

    // Uniform in (0, 1): 53 bits of two words, or 24 of one; never 0 nor 1.
    __device__ __forceinline__ double uniform(int i, double) const {
        const unsigned long long bits =
            (unsigned long long)(word[2 * i] >> 5) << 26 | word[2 * i + 1] >> 6;
        return (double(bits) + 0.5) * 0x1p-53;
    }
    __device__ __forceinline__ float uniform(int i, float) const {
        return (float(word[2 * i] >> 8) + 0.5f) * 0x1p-24f;
    }
};

template <class T>
__device__ void normal(T* out, Index count, Index first, Index seed) {
    const Index stride = Index(gridDim.x) * blockDim.x;
    for (Index pair = Index(blockIdx.x) * blockDim.x + threadIdx.x; 2 * pair < count;
         pair += stride) {
        const Philox random((unsigned long long)(first / 2 + pair), (unsigned long long)seed);
        const T radius = sqrt(T(-2) * log(random.uniform(0, T())));
        const T turns = 2 * random.uniform(1, T());  // half turns: cospi needs no reduction
        out[2 * pair] = radius * cospi(turns);
        if (2 * pair + 1 < count) out[2 * pair + 1] = radius * sinpi(turns);
    }
}

#define NORMAL(name, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        name(T* out, long long count, long long first, long long seed) {                         \
        normal<T>(out, count, first, seed);                                                      \
    }
NORMAL(normal_f32, float)
NORMAL(normal_f64, double)
