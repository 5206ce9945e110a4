// Activations rounded to 8 bits with a scale a token: s = max |x| / LARGEST, q = x / s.
//
// A block rounds one token, whose numbers its threads hold in registers from the search for the largest to the rounding.
// Columns are put into the order in which prefill.cu multiplies bytes: of every 32 columns groups of 4, the first half
// between the second. What fills up a row is zero.
//
// `round_tokens` writes s * q in 16 bits, in their order, for products in 16 bits.
//
// Compiled with -D, besides those of common.cuh:
//   ACTIVATION 8: int8, 80: float8 e4m3
//   THREADS    of a block
//   KEPT       times 8 numbers of a thread, in registers; those of longer tokens are read twice

#define LARGEST (ACTIVATION == 8 ? 127.f : 448.f)

#if ACTIVATION == 8
// Added to a number, it leaves the nearest integer, half to even, in the last bits.
#define ROUNDER 12582912.f
#endif

// Two numbers of 8 bits, the first in the low byte. They are not beyond the largest, for s is not too small.
__device__ __forceinline__ u32 round_pair(float first, float second) {
#if ACTIVATION == 8
    return __byte_perm(__float_as_uint(first + ROUNDER), __float_as_uint(second + ROUNDER), 0x0040) & 0xffff;
#else
    u16 v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(v) : "f"(first), "f"(second));
    return v;
#endif
}

// The same two, multiplied by the scale and rounded to 16 bits.
__device__ __forceinline__ u32 round_pair_in_16_bits(float first, float second, float s) {
#if ACTIVATION == 8
    first = __fsub_rn(__fadd_rn(first, ROUNDER), ROUNDER);
    second = __fsub_rn(__fadd_rn(second, ROUNDER), ROUNDER);
#else
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)round_pair(first, second)));
    asm("cvt.f32.f16 %0, %1;" : "=f"(first) : "h"((u16)halves));
    asm("cvt.f32.f16 %0, %1;" : "=f"(second) : "h"((u16)(halves >> 16)));
#endif
    return from_float(__fmul_rn(first, s)) | (u32)from_float(__fmul_rn(second, s)) << 16;
}

__device__ __forceinline__ u32 larger_magnitudes(u32 a, u32 b) {
    const u32 low = max(a & 0x7fff, b & 0x7fff), high = max(a >> 16 & 0x7fff, b >> 16 & 0x7fff);
    return low | high << 16;
}

__device__ __forceinline__ u32 larger_magnitudes(u32 a, const uint4& v) {
    return larger_magnitudes(larger_magnitudes(a, v.x), larger_magnitudes(v.y, larger_magnitudes(v.z, v.w)));
}

// x / s, rounded once: the division of IEEE 754 without its cases, which do not arise for such scales.
__device__ __forceinline__ bool divides_plainly(float s) { return s > 1e-30f && s < 1e30f; }
__device__ __forceinline__ float divide_plainly(float x, float s, float inverse) {
    const float q = x * inverse;
    return __fmaf_rn(__fmaf_rn(-q, s, x), inverse, q);
}

// The 8 bytes that a thread writes: its own in part, in part those of another that has the other half.
__device__ __forceinline__ uint2 exchange(u32 first, u32 second) {
    // `first` and `second` are groups of 4 columns; those of threads 0 and 2, and of 1 and 3, of every 4 lie in turns.
    const bool later = threadIdx.x & 2;
    const u32 other = __shfl_xor_sync(0xffffffff, later ? first : second, 2);
    return later ? make_uint2(other, second) : make_uint2(first, other);
}

// Where those 8 bytes go, in units of them.
__device__ __forceinline__ int place(int i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

// A token: its numbers, as far as a thread has registers for them, and its scale.
struct Token {
    uint4 kept[KEPT];
    float s, inverse;
    bool plainly;

    // All threads of the block. Numbers from `eighths` times 8 on are zeros. `turn` is another one than for the token before:
    // some threads may still be reading what was largest there.
    __device__ __forceinline__ Token(const uint4* from, int eighths, int turn) {
        __shared__ u32 both[2][THREADS / 32];
        u32* const largest = both[turn];
        const int thread = threadIdx.x;
#pragma unroll
        for (int k = 0; k < KEPT; ++k) {
            const int i = thread + k * THREADS;
            kept[k] = i < eighths ? from[i] : make_uint4(0, 0, 0, 0);
        }
        u32 magnitudes = 0;
#pragma unroll
        for (int k = 0; k < KEPT; ++k) magnitudes = larger_magnitudes(magnitudes, kept[k]);
        for (int i = thread + KEPT * THREADS; i < eighths; i += THREADS) magnitudes = larger_magnitudes(magnitudes, from[i]);
        magnitudes = max(magnitudes & 0xffff, magnitudes >> 16);
        magnitudes = __reduce_max_sync(0xffffffff, magnitudes);
        if (thread % 32 == 0) largest[thread / 32] = magnitudes;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < THREADS / 32; ++i) magnitudes = max(magnitudes, largest[i]);
        s = to_float((u16)magnitudes) / LARGEST;
        if (s == 0.f) s = 1.f;
        plainly = divides_plainly(s);
        inverse = 1.f / s;
    }

    // Calls `write` with two numbers of a word, divided by the scale.
    template <typename Write>
    __device__ __forceinline__ auto divide(u32 word, Write write) const {
        const float first = to_float((u16)word), second = to_float((u16)(word >> 16));
        if (plainly) return write(divide_plainly(first, s, inverse), divide_plainly(second, s, inverse));
        return write(first / s, second / s);
    }

    // Calls `write` with all of this thread's numbers, 8 at a time, up to `end` times 8, and where they are.
    template <typename Write>
    __device__ __forceinline__ void each(const uint4* from, int eighths, int end, Write write) const {
        const int thread = threadIdx.x;
#pragma unroll
        for (int k = 0; k < KEPT; ++k)
            if (k * THREADS < end) write(thread + k * THREADS, kept[k]);
        for (int first = KEPT * THREADS; first < end; first += THREADS) {
            const int i = first + thread;
            write(i, i < eighths ? from[i] : make_uint4(0, 0, 0, 0));
        }
    }
};

// Blocks that fill a multiprocessor with 1024 threads and go on from token to token.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
quantize_tokens(const uint4* x, uint2* q, float* scale, int tokens, int columns, int filled) {
    const int eighths = columns / 8, end = filled / 8;
    wait_for_previous_launch();
    if (threadIdx.x == 0) let_next_launch_begin();
    int turn = 0;
    for (size_t number = blockIdx.x; number < tokens; number += gridDim.x, turn ^= 1) {
        const uint4* const from = x + number * eighths;
        uint2* const to = q + number * end;
        const Token token(from, eighths, turn);
        if (threadIdx.x == 0) scale[number] = token.s;
        token.each(from, eighths, end, [&](int i, const uint4& v) {
            const u32 words[4] = {v.x, v.y, v.z, v.w};
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = token.divide(words[j], round_pair);
            const uint2 bytes = exchange(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
            if (i < end) to[place(i)] = bytes;
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) round_tokens(const uint4* x, uint4* rounded, int columns) {
    const size_t number = blockIdx.x;
    const int eighths = columns / 8;
    const uint4* const from = x + number * eighths;
    uint4* const to = rounded + number * eighths;
    wait_for_previous_launch();
    if (threadIdx.x == 0) let_next_launch_begin();
    const Token token(from, eighths, 0);
    token.each(from, eighths, eighths, [&](int i, const uint4& v) {
        const auto round = [&](u32 word) {
            return token.divide(word, [&](float first, float second) { return round_pair_in_16_bits(first, second, token.s); });
        };
        if (i < eighths) to[i] = make_uint4(round(v.x), round(v.y), round(v.z), round(v.w));
    });
}
