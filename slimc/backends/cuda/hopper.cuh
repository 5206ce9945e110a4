// Hopper's own instructions: the copy engine, its barriers, clusters, and `wgmma` with its left operand in registers.
//
// Compiled with -D, besides those of common.cuh:
//   TOKENS  columns of a product: 8, 16, 32, 64, 128

#define SUMS (TOKENS / 2)  // of a thread, for 64 rows

struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_if(bool condition, u32 barrier) {
    asm volatile("{\n.reg .pred arrives;\nsetp.ne.u32 arrives, %0, 0;\n@arrives mbarrier.arrive.shared::cta.b64 _, [%1];\n}"
                 ::"r"((u32)condition), "r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 barrier, int column, int token) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(token) : "memory");
}

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void wait_named(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void store_transposed(u32 address, u32 low, u32 high) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high) : "memory");
}

// Activations lie in rows of 128 bytes, swizzled over 8 of them: what the copy engine writes and wgmma reads.
__device__ __forceinline__ u64 describe(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

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
