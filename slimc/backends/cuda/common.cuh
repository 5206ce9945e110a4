// What the kernels share: types, the instructions that CUDA C++ has no word for, and codes turned into numbers.
//
// Compiled with -D:
//   BFLOAT16  1: activations, scales and results are bfloat16; 0: float16
//   ARCH      compute capability, 80 or 90

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ u32 load_once(const u32* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ void copy_async(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address));
}

#if BFLOAT16
#define TYPE "bf16"
#define MAGIC 0x43004300u   // 128: its last mantissa bit is worth 1
#define MAGIC_ZERO 0xc308c308u  // -(128 + 8)
#define ONES 0x3f803f80u
#else
#define TYPE "f16"
#define MAGIC 0x64006400u   // 1024
#define MAGIC_ZERO 0xe408e408u  // -(1024 + 8)
#define ONES 0x3c003c00u
#endif

// Two codes become two numbers: as mantissas of a power of two, less that power and the zero point, both exactly.
__device__ __forceinline__ u32 decode_pair(u32 word) {
    u32 v;
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(v) : "r"(word), "r"(MAGIC));
#if ARCH >= 90 || !BFLOAT16
    asm("add.rn." TYPE "x2 %0, %0, %1;" : "+r"(v) : "r"(MAGIC_ZERO));
#else
    asm("fma.rn." TYPE "x2 %0, %0, %1, %2;" : "+r"(v) : "r"(ONES), "r"(MAGIC_ZERO));
#endif
    return v;
}

__device__ __forceinline__ void decode_word(u32 (&a)[4], u32 word) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = decode_pair(word >> (4 * i));
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int SELECTOR>
__device__ __forceinline__ void multiply_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
}

__device__ __forceinline__ float to_float(u16 v) {
#if BFLOAT16
    return __uint_as_float((u32)v << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#endif
}

__device__ __forceinline__ u16 from_float(float f) {
    u16 v;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
}

__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_release(u32* p, u32 v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void wait_for_previous_launch() {
#if ARCH >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_launch_begin() {
#if ARCH >= 90
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
