// Activations rounded to 8 bits with a scale a token: s = max |x| / LARGEST, q = x / s.
//
// A block rounds one token. Columns are put into the order in which prefill.cu multiplies bytes: of every 32 columns
// groups of 4, or of every 16 pairs if the weight is dense, the first half between the second. What fills up a row is zero.
//
// Compiled with -D, besides those of common.cuh:
//   ACTIVATION 8: int8, 80: float8 e4m3
//   SPARSE     1: for a 2:4 weight; 0: for a dense one

#define THREADS 256
#define LARGEST (ACTIVATION == 8 ? 127.f : 448.f)

// Two numbers of 8 bits, the first in the low byte.
__device__ __forceinline__ u32 round_pair(float first, float second) {
#if ACTIVATION == 8
    int low, high;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(low) : "f"(first));
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(high) : "f"(second));
    return (u32)(min(max(low, -127), 127) & 0xff) | (u32)(min(max(high, -127), 127) & 0xff) << 8;
#else
    u16 v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(v) : "f"(first), "f"(second));
    return v;
#endif
}

__device__ __forceinline__ u32 larger_magnitudes(u32 a, u32 b) {
    const u32 low = max(a & 0x7fff, b & 0x7fff), high = max(a >> 16 & 0x7fff, b >> 16 & 0x7fff);
    return low | high << 16;
}

// x / s, rounded once: the division of IEEE 754 without its cases, which do not arise for such scales.
__device__ __forceinline__ bool divides_plainly(float s) { return s > 1e-30f && s < 1e30f; }
__device__ __forceinline__ float divide_plainly(float x, float s, float inverse) {
    const float q = x * inverse;
    return __fmaf_rn(__fmaf_rn(-q, s, x), inverse, q);
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(const uint4* x, u16* q, float* scale, int columns, int filled) {
    __shared__ u32 largest[THREADS / 32];
    const size_t token = blockIdx.x;
    const int thread = threadIdx.x, eighths = columns / 8;
    const uint4* const from = x + token * eighths;
    wait_for_previous_launch();
    if (thread == 0) let_next_launch_begin();

    u32 magnitudes = 0;
    for (int i = thread; i < eighths; i += THREADS) {
        const uint4 v = from[i];
        magnitudes = larger_magnitudes(larger_magnitudes(magnitudes, v.x), larger_magnitudes(v.y, larger_magnitudes(v.z, v.w)));
    }
    magnitudes = max(magnitudes & 0xffff, magnitudes >> 16);
    magnitudes = __reduce_max_sync(0xffffffff, magnitudes);
    if (thread % 32 == 0) largest[thread / 32] = magnitudes;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) magnitudes = max(magnitudes, largest[i]);
    float s = to_float((u16)magnitudes) / LARGEST;
    if (s == 0.f) s = 1.f;
    const bool plainly = divides_plainly(s);
    const float inverse = 1.f / s;
    if (thread == 0) scale[token] = s;

    u16* const to = q + token * (filled / 2);
    for (int i = thread; i < filled / 8; i += THREADS) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (i < eighths) v = from[i];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float first = to_float((u16)words[j]), second = to_float((u16)(words[j] >> 16));
            if (plainly) pairs[j] = round_pair(divide_plainly(first, s, inverse), divide_plainly(second, s, inverse));
            else pairs[j] = round_pair(first / s, second / s);
        }
#if SPARSE
        u32* const group = (u32*)to + i / 4 * 8 + i % 2 * 4 + i % 4 / 2;
        group[0] = pairs[0] | pairs[1] << 16;
        group[2] = pairs[2] | pairs[3] << 16;
#else
#pragma unroll
        for (int j = 0; j < 4; ++j) to[i / 2 * 8 + 2 * j + i % 2] = (u16)pairs[j];
#endif
    }
}
