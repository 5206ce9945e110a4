// Products of a 16-bit left operand in registers with activations in shared memory: `wgmma`, and `wgmma.sp` for 2:4.
//
// Compiled with -D, besides those of common.cuh:
//   TOKENS  columns of a product: 8, 16, 32, 64, 128

#define SUMS (TOKENS / 2)  // of a thread, for 64 rows

#define OUT4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define OUT8(i) OUT4(i), OUT4(i + 4)
#define OUT16(i) OUT8(i), OUT8(i + 8)
#define OUT32(i) OUT16(i), OUT16(i + 16)
#define OUT64(i) OUT32(i), OUT32(i + 32)
#define LIST4 "%0,%1,%2,%3"
#define LIST8 LIST4 ",%4,%5,%6,%7"
#define LIST16 LIST8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST64 LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#if TOKENS == 8
#define OUT OUT4(0)
#define WGMMA_OUT LIST4
#define WGMMA_A "{%4,%5,%6,%7}, %8"
#define WGMMA_SP ", %9, %10"
#elif TOKENS == 16
#define OUT OUT8(0)
#define WGMMA_OUT LIST8
#define WGMMA_A "{%8,%9,%10,%11}, %12"
#define WGMMA_SP ", %13, %14"
#elif TOKENS == 32
#define OUT OUT16(0)
#define WGMMA_OUT LIST16
#define WGMMA_A "{%16,%17,%18,%19}, %20"
#define WGMMA_SP ", %21, %22"
#elif TOKENS == 64
#define OUT OUT32(0)
#define WGMMA_OUT LIST32
#define WGMMA_A "{%32,%33,%34,%35}, %36"
#define WGMMA_SP ", %37, %38"
#else
#define OUT OUT64(0)
#define WGMMA_OUT LIST64
#define WGMMA_A "{%64,%65,%66,%67}, %68"
#define WGMMA_SP ", %69, %70"
#endif
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)

__device__ __forceinline__ void wgmma(float (&c)[SUMS], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) "k16.f32." TYPE "." TYPE " {" WGMMA_OUT "}, " WGMMA_A ", 1, 1, 1, 0;"
                 : OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <int SELECTOR>
__device__ __forceinline__ void wgmma_sparse(float (&c)[SUMS], const u32 (&a)[4], u64 b, u32 metadata) {
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" TEXT(TOKENS) "k32.f32." TYPE "." TYPE " {" WGMMA_OUT "}, " WGMMA_A WGMMA_SP
                 ", 1, 1, 1, 0;"
                 : OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR));
}

__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 v;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Numbers of rows g (registers 0 and 2) and g + 8 (1 and 3), times their scales.
__device__ __forceinline__ void apply_scales(u32 (&v)[4], u32 scales) {
    const u32 low = __byte_perm(scales, 0, 0x1010), high = __byte_perm(scales, 0, 0x3232);
    v[0] = multiply_pair(v[0], low);
    v[1] = multiply_pair(v[1], high);
    v[2] = multiply_pair(v[2], low);
    v[3] = multiply_pair(v[3], high);
}
