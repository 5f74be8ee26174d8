// Standard normal numbers that depend on the seed and their place alone, not on the GPU.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC11);
// Box and Muller, Ann. Math. Statist. 29 (1958).
//
//   out  (columns, n): row c holds the first n numbers of column first + c of the seed's, each a
//        sequence of its own: its number is the upper half of Philox's counter
//
// Launch: grid (columns, any number) of blocks of 256 threads; those of a column walk over pairs of
// numbers.
#include "common.cuh"

struct Philox {
    unsigned word[4];

    // The random words of a counter.
    __device__ __forceinline__ Philox(unsigned long long lower, unsigned long long upper,
                                      unsigned long long seed)
        : word{unsigned(lower), unsigned(lower >> 32), unsigned(upper), unsigned(upper >> 32)} {
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
__device__ void normal(T* out, Index n, Index first, Index seed) {
    T* const to = out + blockIdx.x * n;
    const Index stride = Index(gridDim.y) * blockDim.x;
    for (Index pair = Index(blockIdx.y) * blockDim.x + threadIdx.x; 2 * pair < n; pair += stride) {
        const Philox random(pair, first + blockIdx.x, seed);
        const T radius = sqrt(T(-2) * log(random.uniform(0, T())));
        const T turns = 2 * random.uniform(1, T());  // half turns: cospi needs no reduction
        to[2 * pair] = radius * cospi(turns);
        if (2 * pair + 1 < n) to[2 * pair + 1] = radius * sinpi(turns);
    }
}

#define NORMAL(name, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        name(T* out, long long n, long long first, long long seed) {                             \
        normal<T>(out, n, first, seed);                                                          \
    }
NORMAL(normal_f32, float)
NORMAL(normal_f64, double)
