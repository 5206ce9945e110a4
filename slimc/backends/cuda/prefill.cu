// y = scale * (x @ W^T) + t @ L^T + bias on Hopper, for many tokens.
//
// The weight is the left operand of `wgmma`, or `wgmma.sp` if it is 2:4, and comes from registers; activations are the
// right operand, from shared memory. A block stays on its multiprocessor and computes one tile of results after
// another: one thread has the copy engine bring pieces of activations and of the weight, as it is stored, into a ring of
// slots, across tiles; the warpgroups turn codes into numbers while their products before run. Tiles that would leave
// some multiprocessors idle are divided among blocks by columns, and their sums added in a fixed order.
// t = x @ R^T, the small product, is this kernel's own result in a launch before: W is under way while that runs.
//
// Compiled with -D, besides those of common.cuh:
//   SPARSE     1: W is 2:4; 0: W is dense
//   GROUP      columns of W that share a scale, 0: all of a row
//   VALUES     1: W is 16-bit values, with no GROUP and ACTIVATION 16; 0: it is 4-bit codes
//   ADAPTERS   1: with t and L
//   ACTIVATION 16: of the type that common.cuh is compiled for; 8: int8, 80: float8 e4m3, both with a scale a token
//   TOKENS     of a tile: 64 or 128
//   WARPGROUPS that multiply
//   ROW_TILES  tiles of 64 rows that a warpgroup holds at once
//   STAGES     slots in shared memory
//   OUTPUTS    tokens of 64 rows, of a warpgroup, that have room in shared memory on their way out
//   BLOCKS     blocks that a multiprocessor can hold at once
//   MULTICAST  blocks of a cluster, of neighbouring rows, that bring activations for each other

#define THREADS (128 * (WARPGROUPS + 1))
// Of a thread that multiplies, and of the others: together no more than a block has at its start.
#define REGISTERS (WARPGROUPS == 4 ? 112 : BLOCKS == 1 ? 232 : 104)
#define FEW_REGISTERS (WARPGROUPS == 4 || BLOCKS == 2 ? 32 : 40)
#define BLOCK_ROWS (64 * ROW_TILES * WARPGROUPS)
#define TILES (BLOCK_ROWS / 16)
#define SUMS (TOKENS / 2)  // of a thread, for 64 rows
#define BYTES_8 (ACTIVATION != 16)

// A piece is 128 columns, or 64 of a dense weight that is multiplied in 16 bits. 32 bytes of a row's codes are a unit.
#define COLUMNS (SPARSE || BYTES_8 ? 128 : 64)
#define UNITS (COLUMNS / (SPARSE ? 128 : 64))
#define BOXES (SPARSE && !BYTES_8 ? 2 : 1)  // of 128 bytes a token
#define SCALE_GROUPS (GROUP == 0 ? 1 : COLUMNS > GROUP ? COLUMNS / GROUP : 1)
#define BOX_BYTES (TOKENS * 128)
#define CODES_AT (BOXES * BOX_BYTES)
#define WORDS (VALUES ? 4 : 1)  // of a lane, each of 16 bytes, in a unit; of values those of all tiles lie together
#define METADATA_AT (CODES_AT + TILES * 512 * UNITS * WORDS)
#define SCALES_AT (METADATA_AT + (SPARSE ? TILES * 256 : 0))
#define SLOT_BYTES ((SCALES_AT + (GROUP > 0 || ADAPTERS ? TILES * 32 * SCALE_GROUPS : 0) + 1023) / 1024 * 1024)

// Tensor cores add up products of bytes that have one scale. Where W has groups, its int8 operands are made of codes and
// scales, rounded, with a scale a row; float8 cannot hold those well enough: sums of a group are multiplied by its scales.
#define INTEGERS_OF_ROWS (ACTIVATION == 8 && GROUP > 0)
#define SUMS_OF_GROUPS (ACTIVATION == 80 && GROUP > 0)

struct Arguments {
    TensorMap x_map;       // activations [tokens, columns], in boxes of TOKENS / MULTICAST x 128 bytes
    TensorMap t_map;       // t [tokens, ranks], in boxes of TOKENS x 128 bytes
    TensorMap y_map;       // [tokens, rows], in boxes of OUTPUTS x 128 bytes, if rows are a multiple of 8
    TensorMap codes_map;    // of W, [row tiles of 16][units][lane][4] words, in boxes of TILES x UNITS, as all that follow of one;
                            // if VALUES [row tiles][units][4 instructions][lane][4], in boxes of TILES x 1
    TensorMap metadata_map; // of W if SPARSE, [row tiles][units][lane][2] words
    TensorMap scale_map;    // of W if GROUP, [row tiles][groups][8] words: rows g and g + 8
    TensorMap left_map;     // of L, [row tiles][left units][lane][4] words
    TensorMap left_scale_map; // [row tiles][left units][8] words
    u16* y;                // [tokens, rows]
    const u16* scale;      // [1] or [rows], if not GROUP; [rows], the largest magnitude of a row's, if INTEGERS_OF_ROWS
    const u16* bias;       // [rows] or null
    const int2* rank_range; // [row tiles]: first rank that a tile's L reads, and how many units of 64
    const float* token_scale; // [tokens], if ACTIVATION has 8 bits
    float4* parts;         // [blocks][tiles of 64 rows][8 tokens][thread]: sums of shares of tiles
    u32* ready;            // [blocks][warpgroups]: 1 where they are written; 0 before and after the launch
    int tokens;
    int rows;
    int row_tiles;         // of 16 rows
    int pieces;            // of a row tile: columns / COLUMNS, rounded up
    int row_scale;         // 1: a scale a row, 0: one for all
    int left_units;        // units of 64 ranks that a row of L has room for
    int token_tiles;       // tokens / TOKENS, rounded up
    int row_blocks;        // rows / BLOCK_ROWS / MULTICAST, rounded up
    int shared_tiles;      // the first tiles, whose pieces are divided evenly among clusters
    u32 share;             // pieces of a cluster
    u32 share_rest;        // clusters that have one more
    u32 inverse;           // 2^32 / pieces of a tile, rounded up: a division that the compiler knows to be the same in all lanes
    int wait_first;        // 1: x may still be written by the launch before
    u32 zero;              // 0, which the compiler does not know
    int band;              // token tiles that all rows go through before the next ones: their activations stay in the cache
};

// ------------------------------------------------------------------------------------------------- instructions

// Arrive at the barrier of the same place in another block of the cluster: without a release at the cluster's scope, which
// would be a fence for the whole device. What was read here is read; nothing was written.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, int block) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(block) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ void load_box_everywhere(u32 to, const TensorMap* map, u32 barrier, int column, int token) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(token), "h"((u16)((1 << MULTICAST) - 1)) : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, u32 from, int row, int token) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;"
                 ::"l"(map), "r"(from), "r"(row), "r"(token) : "memory");
}
__device__ __forceinline__ void wait_until_boxes_are_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_until_boxes_are_stored() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void wait_until_set(const u32* p) {
    asm volatile("{\n.reg .pred unset;\n.reg .b32 v;\nagain:\nld.acquire.gpu.global.u32 v, [%0];\nsetp.eq.u32 unset, v, 0;\n"
                 "@unset bra again;\n}" ::"l"(p) : "memory");
}

__device__ __forceinline__ uint4 read_uint4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint2 read_uint2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ u32 read_word(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

#define OUT4(t, i) t(c[i]), t(c[i + 1]), t(c[i + 2]), t(c[i + 3])
#define OUT16(t, i) OUT4(t, i), OUT4(t, i + 4), OUT4(t, i + 8), OUT4(t, i + 12)
#define OUT32(t, i) OUT16(t, i), OUT16(t, i + 16)
#define OUT64(t) OUT32(t, 0), OUT32(t, 32)
#define LIST32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST64 LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#if TOKENS == 64
#define OUT(t) OUT32(t, 0)
#define WGMMA_OUT LIST32
#define WGMMA_A "{%32,%33,%34,%35}, %36"
#define WGMMA_SP ", %37, %38"
#else
#define OUT(t) OUT64(t)
#define WGMMA_OUT LIST64
#define WGMMA_A "{%64,%65,%66,%67}, %68"
#define WGMMA_SP ", %69, %70"
#endif
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)

__device__ __forceinline__ void wgmma(float (&c)[SUMS], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) "k16.f32." TYPE "." TYPE " {" WGMMA_OUT "}, " WGMMA_A ", 1, 1, 1, 0;"
                 : OUT("+f") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#if ACTIVATION == 8
typedef int Sum;
#define SUM "+r"
#define WGMMA_SPARSE "k64.s32.s8.s8"
#define WGMMA_DENSE "k32.s32.s8.s8"
#define WGMMA_SIGNS ";"
#elif ACTIVATION == 80
typedef float Sum;
#define SUM "+f"
#define WGMMA_SPARSE "k64.f32.e4m3.e4m3"
#define WGMMA_DENSE "k32.f32.e4m3.e4m3"
#define WGMMA_SIGNS ", 1, 1;"
#else
typedef float Sum;
#define SUM "+f"
#define WGMMA_SPARSE "k32.f32." TYPE "." TYPE
#define WGMMA_DENSE "k16.f32." TYPE "." TYPE
#define WGMMA_SIGNS ", 1, 1, 0;"
#endif

#if SPARSE
template <int SELECTOR>
__device__ __forceinline__ void multiply(Sum (&c)[SUMS], const u32 (&a)[4], u64 b, u32 metadata) {
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" TEXT(TOKENS) WGMMA_SPARSE " {" WGMMA_OUT "}, " WGMMA_A WGMMA_SP ", 1" WGMMA_SIGNS
                 : OUT(SUM) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR));
}
#else
__device__ __forceinline__ void multiply(Sum (&c)[SUMS], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) WGMMA_DENSE " {" WGMMA_OUT "}, " WGMMA_A ", 1" WGMMA_SIGNS
                 : OUT(SUM) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

#if SUMS_OF_GROUPS
// The same, in place of what was in c.
__device__ __forceinline__ void multiply_anew(Sum (&c)[SUMS], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) WGMMA_DENSE " {" WGMMA_OUT "}, " WGMMA_A ", 0" WGMMA_SIGNS
                 : OUT(SUM) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 v;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// --------------------------------------------------------------------------------------------------------- weights

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Numbers of rows g (registers 0 and 2) and g + 8 (1 and 3), times their scales.
__device__ __forceinline__ void apply_scales(u32 (&v)[4], u32 scales) {
    const u32 low = __byte_perm(scales, 0, 0x1010), high = __byte_perm(scales, 0, 0x3232);
    v[0] = multiply_pair(v[0], low);
    v[1] = multiply_pair(v[1], high);
    v[2] = multiply_pair(v[2], low);
    v[3] = multiply_pair(v[3], high);
}

// In the same register, whatever the compiler thinks: it has no room for two sets of sums.
__device__ __forceinline__ void add_in_place(float& sum, float v) { asm volatile("add.f32 %0, %0, %1;" : "+f"(sum) : "f"(v)); }
#if ACTIVATION == 8
__device__ __forceinline__ void scale_sum(float& sum, int products, float scale) { sum = (float)products * scale; }
#else
__device__ __forceinline__ void scale_sum(float& sum, float, float scale) { asm volatile("mul.f32 %0, %0, %1;" : "+f"(sum) : "f"(scale)); }
#endif

// ------------------------------------------------------------------------------------------------------ main loops

struct Pipeline {
    u32 slots, full, empty;
    int slot, parity;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ u32 data() const { return slots + slot * SLOT_BYTES; }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * slot, parity); }
};

// What the compiler shall keep in a register: it would compute it again for each piece, which costs more than products leave.
__device__ __forceinline__ u32 kept(u32 v) {
    asm volatile("mov.u32 %0, %0;" : "+r"(v));
    return v;
}

// A thread's view of the pieces that it multiplies.
struct Reader {
    Pipeline at;
    u32 codes, metadata, scales;  // where this thread's words of the first slot are, of W
    u32 left_codes, left_scales;  // and of L
    u32 releases;                 // the barrier that says that the piece before has been multiplied
    bool speaks;                  // whether this thread says so for its warpgroup
    u32 zero;                     // 0, which the compiler does not know
#if BYTES_8
    u32 mask, own, other;         // of decoding
#endif

    // `nobody` is a barrier at which none waits: before the first piece there is none to release.
    __device__ __forceinline__ Reader(const Pipeline& pipeline, u32 nobody, int tile, u32 zero) : at(pipeline), zero(zero) {
        const int lane = threadIdx.x % 32;
        codes = kept(at.slots + CODES_AT + tile * 512 * UNITS + lane * 16);
        left_codes = UNITS == 1 ? codes : kept(at.slots + CODES_AT + tile * 512 + lane * 16);
        metadata = kept(at.slots + METADATA_AT + tile * 256 + lane * 8);
        scales = kept(at.slots + SCALES_AT + tile * 32 * SCALE_GROUPS + lane / 4 * 4);
        left_scales = SCALE_GROUPS == 1 ? scales : kept(at.slots + SCALES_AT + tile * 32 + lane / 4 * 4);
        releases = nobody;
        speaks = kept(threadIdx.x % 128) < (MULTICAST > 1 ? MULTICAST : 1);
#if BYTES_8
        mask = kept(0xf0f0f0f0);
#if SPARSE
        own = kept(lane & 1 ? 0x7632 : 0x5410);
#else
        own = kept(lane & 1 ? 0x2064 : 0x6420);
        other = kept(lane & 1 ? 0x3175 : 0x7531);
#endif
#endif
    }

    __device__ __forceinline__ u32 offset() const { return at.slot * SLOT_BYTES; }

    // The wait ahead of this call has seen the last product with the piece before the current one end.
    __device__ __forceinline__ void release_previous() {
#if MULTICAST > 1
        if (speaks) barrier_arrive_at(releases, threadIdx.x % 128);
#else
        if (speaks) barrier_arrive(releases);
#endif
        releases = at.empty + 8 * at.slot;
    }
};

// The same in all lanes, which the compiler does not see of what is loaded; products would wait for their addresses.
__device__ __forceinline__ int uniform(int v) { return __reduce_max_sync(0xffffffff, v); }

#if BYTES_8
// Words of two products with 16-bit operands become the operand of one with bytes, in which a register has the codes of
// two groups of 4 columns that lay 16 apart if W is 2:4, else of one group: quantize.cu puts activations into that order.
#if ACTIVATION == 8
#define CODE_UNIT (INTEGERS_OF_ROWS ? 8.f / 127 : 1.f / 16)

// Codes less their zero point of 8, times 16.
__device__ __forceinline__ void decode_bytes(u32& low, u32& high, u32 word, u32 mask) {
    low = ((word << 4) & mask) ^ 0x80808080;
    high = (word & mask) ^ 0x80808080;
}
#else
#define CODE_UNIT 512.f

// Codes less their zero point, as multiples of the smallest e4m3: up to 8 of it, its bits are the number of them.
__device__ __forceinline__ u32 bytes_of_low(u32 word) {
    const u32 negative = (~word >> 3) & 0x01010101;
    return ((word & 0x07070707) ^ (negative * 7)) + negative * 0x81;
}
__device__ __forceinline__ void decode_bytes(u32& low, u32& high, u32 word, u32) {
    low = bytes_of_low(word);
    high = bytes_of_low(word >> 4);
}
#endif

#if INTEGERS_OF_ROWS
// What the largest scale of a row multiplies its codes by, so that 8 becomes 127, in 256ths.
#define LARGEST_MULTIPLIER (127 * 256 / 8)

// By what codes of rows g and g + 8 are multiplied, and what is added to the products, for the zero point and to round them.
struct Multipliers {
    u32 low, high, low_offset, high_offset;

    __device__ __forceinline__ Multipliers(u32 scales, const float (&inverse)[2])
        : low(__float2int_rn(to_float((u16)scales) * inverse[0])), high(__float2int_rn(to_float((u16)(scales >> 16)) * inverse[1])),
          low_offset((128 - 8 * low) * 0x10001), high_offset((128 - 8 * high) * 0x10001) {}
};

// Lanes exchange as below. Two codes are multiplied at once, in halves of a word; the upper byte of each is the integer. A
// negative lower half takes a 256th of a unit from the upper one.
__device__ __forceinline__ void decode_operand(u32 (&a)[4], u32 first, u32 second, const Multipliers& m, const Reader& r) {
    const bool odd = threadIdx.x & 1;
    const u32 own = odd ? second : first, other = __shfl_xor_sync(0xffffffff, odd ? first : second, 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 multiplier = i & 1 ? m.high : m.low, offset = i & 1 ? m.high_offset : m.low_offset;
        a[i] = __byte_perm((own >> (4 * i) & 0xf000f) * multiplier + offset, (other >> (4 * i) & 0xf000f) * multiplier + offset, r.other);
    }
}
#elif SPARSE
__device__ __forceinline__ void decode_operand(u32 (&a)[4], u32 first, u32 second, const Reader& r) {
    decode_bytes(a[0], a[1], __byte_perm(first, 0, 0x3120), r.mask);
    decode_bytes(a[2], a[3], __byte_perm(second, 0, 0x3120), r.mask);
}
#else
// A group of 4 columns lies in an even lane and the next: the even one takes those of the first 16 columns, the other the rest.
__device__ __forceinline__ void decode_operand(u32 (&a)[4], u32 first, u32 second, const Reader& r) {
    const bool odd = threadIdx.x & 1;
    const u32 own = odd ? second : first, other = __shfl_xor_sync(0xffffffff, odd ? first : second, 1);
    decode_bytes(a[0], a[1], __byte_perm(own, other, r.own), r.mask);
    decode_bytes(a[2], a[3], __byte_perm(own, other, r.other), r.mask);
}
#endif

#if SPARSE
// Metadata in the order of those operands, in which a lane has all of a row: even lanes row g, odd ones row g + 8.
__device__ __forceinline__ uint2 reorder_metadata(uint2 m, const Reader& r) {
    const u32 own = __byte_perm(m.x, m.y, r.own);
    const u32 other = __shfl_xor_sync(0xffffffff, __byte_perm(m.x, m.y, r.own ^ 0x2222), 1);
    const bool odd = threadIdx.x & 1;
    const u32 first = odd ? other : own, second = odd ? own : other;
    const u32 low = (first & ~r.mask) | ((second << 4) & r.mask);
    const u32 high = ((first >> 4) & ~r.mask) | (second & r.mask);
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}
#endif
#endif

// What a block, or each of a cluster, computes next: some pieces of a tile, those of L after those of W.
struct Segment { int tile, first, last; };

// Shares of tiles come first, from the last to the first: what another block waits for is done before this one waits.
struct Work {
    int pieces, begin, end, last_shared, shares;

    __device__ __forceinline__ Work(const Arguments& a)
        : pieces(a.pieces + (ADAPTERS ? a.left_units : 0)), begin(share(a, blockIdx.x / MULTICAST)), end(share(a, blockIdx.x / MULTICAST + 1)),
          last_shared(tile_of(a, end - 1)), shares(begin < end ? last_shared - tile_of(a, begin) + 1 : 0) {}

    static __device__ __forceinline__ int share(const Arguments& a, u32 cluster) { return a.share * cluster + min(cluster, a.share_rest); }
    static __device__ __forceinline__ int tile_of(const Arguments& a, u32 piece) { return (u64)piece * a.inverse >> 32; }

    // A function of a counter alone, without a branch: so the compiler knows its results to be the same in all lanes.
    __device__ __forceinline__ Segment segment(const Arguments& a, int i) const {
        const bool shared = i < shares;
        const int tile = shared ? last_shared - i : a.shared_tiles + blockIdx.x / MULTICAST + (i - shares) * (gridDim.x / MULTICAST);
        return {tile, shared ? max(begin - tile * pieces, 0) : 0, shared ? min(end - tile * pieces, pieces) : pieces};
    }
};

struct Place { int row_block, token_tile; };

__device__ __forceinline__ Place place_of(const Arguments& a, const Segment& s) {
    const int first = s.tile / (a.band * a.row_blocks) * a.band, inside = s.tile - first * a.row_blocks;
    const int width = min(a.band, a.token_tiles - first);
    return {inside / width, first + inside % width};
}

__device__ __forceinline__ int first_row_tile(const Arguments& a, const Segment& s, int block) {
    return (place_of(a, s).row_block * MULTICAST + block) * TILES;
}
__device__ __forceinline__ int2 ranks_of(const Arguments& a, int row_tile) { return a.rank_range[min(row_tile, a.row_tiles - 1)]; }

// Units of L of the rows of a cluster that read most: the others wait for them.
__device__ __forceinline__ int most_left_units(const Arguments& a, const Segment& s) {
    int units = 0;
#pragma unroll
    for (int block = 0; block < MULTICAST; ++block) units = max(units, ranks_of(a, first_row_tile(a, s, block)).y);
    return units;
}

// One thread has all pieces of all tiles of this block brought.
__device__ __forceinline__ void bring_pieces(const Arguments& a, Pipeline p) {
    prefetch_map(&a.x_map);
    prefetch_map(&a.codes_map);
    if (a.wait_first) {
        wait_for_previous_launch();
        let_next_launch_begin();
    }
    int used = 0;
    const Work work(a);
    for (int i = 0;; ++i) {
        const Segment s = work.segment(a, i);
        if (s.tile >= a.row_blocks * a.token_tiles) break;
        const int block_tile = first_row_tile(a, s, blockIdx.x % MULTICAST), token = place_of(a, s).token_tile * TOKENS;
        for (int unit = s.first; unit < min(s.last, a.pieces); ++unit) {
            if (used >= STAGES) barrier_wait(p.empty + 8 * p.slot, p.parity ^ 1);
            const u32 barrier = p.full + 8 * p.slot, to = p.data();
            barrier_expect(barrier, BOXES * BOX_BYTES + TILES * (512 * UNITS * WORDS + (SPARSE ? 256 : 0) + (GROUP > 0 ? 32 * SCALE_GROUPS : 0)));
#pragma unroll
            for (int box = 0; box < BOXES; ++box) {
#if MULTICAST > 1
                const int part = blockIdx.x % MULTICAST;
                load_box_everywhere(to + box * BOX_BYTES + part * (BOX_BYTES / MULTICAST), &a.x_map, barrier, unit * COLUMNS + box * 64,
                                    token + part * (TOKENS / MULTICAST));
#else
                load_box(to + box * BOX_BYTES, &a.x_map, barrier, unit * COLUMNS + box * 64, token);
#endif
            }
#pragma unroll
            for (int i = 0; i < WORDS; ++i)
                load_box(to + CODES_AT + i * TILES * 512, &a.codes_map, barrier, (unit * WORDS + i) * 128 * UNITS, block_tile);
#if SPARSE
            load_box(to + METADATA_AT, &a.metadata_map, barrier, unit * 64, block_tile);
#endif
#if GROUP > 0
            load_box(to + SCALES_AT, &a.scale_map, barrier, unit * COLUMNS / GROUP * 8, block_tile);
#endif
            p.advance();
            ++used;
        }
#if ADAPTERS
        if (s.last > a.pieces) wait_for_previous_launch();  // which costs nothing but the first time
        const int2 ranks = ranks_of(a, block_tile);
        for (int unit = max(s.first - a.pieces, 0); unit < min(s.last - a.pieces, most_left_units(a, s)); ++unit) {
            if (used >= STAGES) barrier_wait(p.empty + 8 * p.slot, p.parity ^ 1);
            const u32 barrier = p.full + 8 * p.slot, to = p.data();
            if (unit >= ranks.y) {
                barrier_arrive(barrier);
            } else {
                barrier_expect(barrier, BOX_BYTES + TILES * (512 + 32));
                load_box(to, &a.t_map, barrier, ranks.x + unit * 64, token);
                load_box(to + CODES_AT, &a.left_map, barrier, unit * 128, block_tile);
                load_box(to + SCALES_AT, &a.left_scale_map, barrier, unit * 8, block_tile);
            }
            p.advance();
            ++used;
        }
#endif
    }
}

// Operands in registers must stay as they are until the products that read them are done: two sets take turns, each of
// which holds the operands of half a piece.
#define PRODUCTS (SPARSE && BYTES_8 ? 2 : 4)  // of a piece
#define BATCH (PRODUCTS / 2)
#define LEFT_BATCH (WARPGROUPS == 4 ? 1 : 2)  // registers are scarcer there

// The assembler does not know how long a product reads its metadata, and puts other things into the register: this one
// word takes the place of another that stays alive until then. (Straight from a load it would let no products overlap.)
__device__ __forceinline__ void replace_metadata(u32& metadata, u32 word, u32 zero) {
    asm volatile("lop3.b32 %0, %1, %2, %0, 0x78;" : "+r"(metadata) : "r"(word), "r"(zero));
}

#if SUMS_OF_GROUPS
#define GROUP_PRODUCTS (PRODUCTS / SCALE_GROUPS)
#define SETS (REGISTERS > 200 ? 2 : 1)  // of sums of bytes: with two, products of a group run while sums of the one before are added

__device__ __forceinline__ void add_group(float (&sum)[SUMS], const Sum (&products)[SUMS], u32 scales) {
    const float low = to_float((u16)scales), high = to_float((u16)(scales >> 16));
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
        sum[i] = fmaf((float)products[i], low, sum[i]);
        sum[i + 1] = fmaf((float)products[i + 1], low, sum[i + 1]);
        sum[i + 2] = fmaf((float)products[i + 2], high, sum[i + 2]);
        sum[i + 3] = fmaf((float)products[i + 3], high, sum[i + 3]);
    }
}

__device__ __forceinline__ void multiply_groups(float (&sum)[SUMS], Reader& r) {
    r.release_previous();
    r.at.wait_full();
    const u32 offset = r.offset();
    uint4 codes[UNITS];
    u32 scales[SCALE_GROUPS];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) codes[unit] = read_uint4(r.codes + offset + unit * 512);
#pragma unroll
    for (int j = 0; j < SCALE_GROUPS; ++j) scales[j] = read_word(r.scales + offset + j * 32);
    const u64 box = describe(r.at.data());
    Sum products[SETS][SUMS];
    u32 of[2][GROUP_PRODUCTS][4];
#pragma unroll
    for (int j = 0; j < SCALE_GROUPS; ++j) {
#pragma unroll
        for (int k = 0; k < GROUP_PRODUCTS; ++k) {
            const int i = j * GROUP_PRODUCTS + k;
            decode_operand(of[j % 2][k], word_of(codes[i / 2], 2 * i % 4), word_of(codes[i / 2], 2 * i % 4 + 1), r);
        }
        if (SETS == 1 && j > 0) {
            wgmma_wait<0>();
            add_group(sum, products[0], scales[j - 1]);
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < GROUP_PRODUCTS; ++k) {
            const int i = j * GROUP_PRODUCTS + k;
            if (k == 0) multiply_anew(products[j % SETS], of[j % 2][k], box + i * 32 / 16);
            else multiply(products[j % SETS], of[j % 2][k], box + i * 32 / 16);
        }
        wgmma_commit();
        if (SETS == 2 && j > 0) {
            wgmma_wait<1>();
            add_group(sum, products[(j - 1) % SETS], scales[j - 1]);
        }
    }
    wgmma_wait<0>();
    add_group(sum, products[(SCALE_GROUPS - 1) % SETS], scales[SCALE_GROUPS - 1]);
    r.at.advance();
}
#else
__device__ __forceinline__ void multiply_weights(Sum (&sum)[ROW_TILES][SUMS], u32 (&metadata)[2][ROW_TILES], Reader& r,
                                                 const float (&inverse)[ROW_TILES][2]) {
    r.at.wait_full();
    const u32 offset = r.offset();
#if !VALUES
    uint4 codes[ROW_TILES][UNITS];
#endif
#if SPARSE
    uint2 words[ROW_TILES];
#endif
#if GROUP > 0
    u32 scales[ROW_TILES][SCALE_GROUPS];
#endif
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#if !VALUES
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) codes[m][unit] = read_uint4(r.codes + offset + (4 * m * UNITS + unit) * 512);
#endif
#if SPARSE
        words[m] = read_uint2(r.metadata + offset + 4 * m * 256);
#if BYTES_8
        words[m] = reorder_metadata(words[m], r);
#endif
#endif
#if GROUP > 0
#pragma unroll
        for (int j = 0; j < SCALE_GROUPS; ++j)
            scales[m][j] = read_word(r.scales + offset + (4 * m * SCALE_GROUPS + j) * 32);
#endif
    }
    const u64 box = describe(r.at.data());
    u32 of[2][BATCH][ROW_TILES][4];
#pragma unroll
    for (int batch = 0; batch < 2; ++batch) {
        const int set = batch;
#if SPARSE
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) replace_metadata(metadata[set][m], set ? words[m].y : words[m].x, r.zero);
#endif
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int j = batch * BATCH + i;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#if INTEGERS_OF_ROWS
                const Multipliers by(scales[m][j * SCALE_GROUPS / PRODUCTS], inverse[m]);
                decode_operand(of[set][i][m], word_of(codes[m][j / 2], 2 * j % 4), word_of(codes[m][j / 2], 2 * j % 4 + 1), by, r);
#elif BYTES_8
                decode_operand(of[set][i][m], word_of(codes[m][j / 2], 2 * j % 4), word_of(codes[m][j / 2], 2 * j % 4 + 1), r);
#elif VALUES
                const uint4 values = read_uint4(r.codes + offset + (j * TILES + 4 * m) * 512);
                of[set][i][m][0] = values.x ^ r.zero, of[set][i][m][1] = values.y ^ r.zero;
                of[set][i][m][2] = values.z ^ r.zero, of[set][i][m][3] = values.w ^ r.zero;
#else
                decode_word(of[set][i][m], word_of(codes[m][0], j));
#endif
#if GROUP > 0 && !BYTES_8
                apply_scales(of[set][i][m], scales[m][j * SCALE_GROUPS / PRODUCTS]);
#endif
            }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int j = batch * BATCH + i;
            // A product reads 64 bytes of a token if W is 2:4, else 32.
            const int inside = SPARSE ? j / 2 * BOX_BYTES + j % 2 * 64 : j * 32;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#if SPARSE && BYTES_8
                multiply<0>(sum[m], of[set][i][m], box + inside / 16, metadata[set][m]);
#elif SPARSE
                if (j & 1) multiply<1>(sum[m], of[set][i][m], box + inside / 16, metadata[set][m]);
                else multiply<0>(sum[m], of[set][i][m], box + inside / 16, metadata[set][m]);
#else
                multiply(sum[m], of[set][i][m], box + inside / 16);
#endif
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (batch == 0) r.release_previous();
    }
    r.at.advance();
}
#endif

__device__ __forceinline__ void multiply_left(float (&sum)[ROW_TILES][SUMS], Reader& r) {
    r.at.wait_full();
    const u32 offset = r.offset();
    uint4 codes[ROW_TILES];
    u32 scales[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        codes[m] = read_uint4(r.left_codes + offset + 4 * m * 512);
        scales[m] = read_word(r.left_scales + offset + 4 * m * 32);
    }
    const u64 box = describe(r.at.data());
    u32 of[2][LEFT_BATCH][ROW_TILES][4];
#pragma unroll
    for (int batch = 0; batch < 4 / LEFT_BATCH; ++batch) {
        const int set = batch & 1;
#pragma unroll
        for (int i = 0; i < LEFT_BATCH; ++i) {
            const int j = batch * LEFT_BATCH + i;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                decode_word(of[set][i][m], word_of(codes[m], j));
                apply_scales(of[set][i][m], scales[m]);
            }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < LEFT_BATCH; ++i)
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) wgmma(sum[m], of[set][i][m], box + (batch * LEFT_BATCH + i) * 2);
        wgmma_commit();
        wgmma_wait<1>();
        if (batch == 0) r.release_previous();
    }
    r.at.advance();
}

// ------------------------------------------------------------------------------------------------------------ kernel

// Write what a warpgroup has summed of its tokens: 8 tokens of 64 rows at a time lie as fragments in `sums`.
struct Output {
    const Arguments& a;
    u32 staged;  // room for OUTPUTS rows of 128 bytes, swizzled like activations

    __device__ __forceinline__ void stage(const float (&s)[SUMS], int from, int block, float low, float high, int warp, int lane) const {
        const u32 first = from_float(s[4 * from] + low) | (u32)from_float(s[4 * from + 1] + low) << 16;
        const u32 second = from_float(s[4 * from + 2] + high) | (u32)from_float(s[4 * from + 3] + high) << 16;
        const int token = lane & 7, piece = 2 * warp + ((lane >> 3) & 1);
        store_transposed(staged + (block * 8 + token) * 128 + ((piece ^ token) << 4), first, second);
    }

    __device__ __forceinline__ void write(int first_row, int first_token) const {
        if (a.rows % 8 == 0) {
            if (threadIdx.x % 128 == 0) store_box(&a.y_map, staged, first_row, first_token);
            return;
        }
        for (int i = threadIdx.x % 128; i < OUTPUTS * 8; i += 128) {
            const int at = i / 8, piece = i % 8, row = first_row + 8 * piece;
            const uint4 v = read_uint4(staged + at * 128 + ((piece ^ (at & 7)) << 4));
            if (first_token + at >= a.tokens) continue;
            u16* const to = a.y + (size_t)(first_token + at) * a.rows + row;
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (row + k < a.rows) to[k] = (u16)(words[k / 2] >> (16 * (k & 1)));
        }
    }
};

// Sums of a share of a tile on their way to the block that ends it.
#define PART (ROW_TILES * (TOKENS / 8) * 128 * WARPGROUPS)

__device__ __forceinline__ void write_part(float4* to, const float (&sum)[ROW_TILES][SUMS]) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * SUMS; i += 4)
        to[i / 4 * 128 * WARPGROUPS] = make_float4(sum[i / SUMS][i % SUMS], sum[i / SUMS][i % SUMS + 1], sum[i / SUMS][i % SUMS + 2], sum[i / SUMS][i % SUMS + 3]);
}

__device__ __forceinline__ float4 load_part(const float4* from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void add_part(const float4* from, float (&sum)[ROW_TILES][SUMS]) {
    // Several loads are under way at once: one after another they would take as long as a tile.
    constexpr int LOADS = WARPGROUPS == 4 ? 4 : 8;
#pragma unroll
    for (int first = 0; first < ROW_TILES * SUMS / 4; first += LOADS) {
        float4 v[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) v[i] = load_part(from + (first + i) * 128 * WARPGROUPS);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int at = 4 * (first + i), m = at / SUMS;
            add_in_place(sum[m][at % SUMS], v[i].x);
            add_in_place(sum[m][at % SUMS + 1], v[i].y);
            add_in_place(sum[m][at % SUMS + 2], v[i].z);
            add_in_place(sum[m][at % SUMS + 3], v[i].w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) prefill_linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 1];
#if BYTES_8
    __shared__ __align__(8) float token_scales[WARPGROUPS][TOKENS];
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 slots = shared_address(shared);
    Pipeline pipeline{slots, shared_address(barriers), shared_address(barriers + STAGES), 0, 0};

    if (threadIdx.x == 0) {
        barrier_init(shared_address(barriers + 2 * STAGES), WARPGROUPS * MULTICAST);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(pipeline.full + 8 * i, 1);
            barrier_init(pipeline.empty + 8 * i, WARPGROUPS * MULTICAST);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
#if MULTICAST > 1
    cluster_sync();
#else
    __syncthreads();
#endif

    if (warp >= 4 * WARPGROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        if (warp == 4 * WARPGROUPS && lane == 0) bring_pieces(a, pipeline);
#if MULTICAST > 1
        __syncwarp();
        cluster_sync();
#endif
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    if (BYTES_8 && a.wait_first) wait_for_previous_launch();

    const int group = warp / 4;
    const int own_tile = group * 4 * ROW_TILES + warp % 4;
    const u32 staged = slots + STAGES * SLOT_BYTES + group * OUTPUTS * 128;
    const Output output{a, staged};
    Reader reader(pipeline, shared_address(barriers + 2 * STAGES), own_tile, a.zero);
#if !SUMS_OF_GROUPS
    u32 metadata[2][ROW_TILES] = {};
#endif
    const Work work(a);
    for (int i = 0;; ++i) {
        const Segment s = work.segment(a, i);
        if (s.tile >= a.row_blocks * a.token_tiles) break;
        const int block_tile = first_row_tile(a, s, blockIdx.x % MULTICAST), token = place_of(a, s).token_tile * TOKENS;
#if ADAPTERS
        const int units = uniform(ranks_of(a, block_tile).y);
#endif
        float inverse[ROW_TILES][2] = {};
#if INTEGERS_OF_ROWS
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            const int row = (block_tile + own_tile + 4 * (i / 2)) * 16 + 8 * (i % 2) + lane / 4;
            const float largest = to_float(a.scale[min(row, a.rows - 1)]);
            inverse[i / 2][i % 2] = largest == 0.f ? 0.f : LARGEST_MULTIPLIER / largest;
        }
#endif
#if SUMS_OF_GROUPS
        static_assert(ROW_TILES == 1, "there is no room for more sums");
        float sum[1][SUMS] = {};
#else
        Sum products[ROW_TILES][SUMS] = {};
#endif
#if BYTES_8
        const float token_scale = a.token_scale[token + threadIdx.x % TOKENS];
#endif
#pragma unroll 1
        for (int left = min(s.last, a.pieces) - s.first; left > 0; --left)
#if SUMS_OF_GROUPS
            multiply_groups(sum[0], reader);
#else
            multiply_weights(products, metadata, reader, inverse);
#endif
        // While the last products run: these would cost registers before.
        float scale[ROW_TILES][2], bias[ROW_TILES][2];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = (block_tile + own_tile + 4 * m) * 16 + 8 * half + lane / 4;
                scale[m][half] = 1.f;
                if (GROUP == 0 || INTEGERS_OF_ROWS) scale[m][half] = to_float(a.scale[a.row_scale ? min(row, a.rows - 1) : 0]);
                bias[m][half] = a.bias ? to_float(a.bias[min(row, a.rows - 1)]) : 0.f;
            }
#if BYTES_8
        token_scales[group][threadIdx.x % TOKENS] = token_scale;
        wait_named(2 + group, 128);
#endif
        wgmma_wait<0>();
#if SUMS_OF_GROUPS
        float (&products)[1][SUMS] = sum;
#elif ACTIVATION == 8
        float sum[ROW_TILES][SUMS];
#else
        float (&sum)[ROW_TILES][SUMS] = products;
#endif
#if GROUP == 0 || BYTES_8
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
#if BYTES_8
            const float2 s = *(const float2*)&token_scales[group][2 * i + lane % 4 * 2];
            const float even = s.x * CODE_UNIT, odd = s.y * CODE_UNIT;
#else
            const float even = 1.f, odd = 1.f;
#endif
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                scale_sum(sum[m][i], products[m][i], scale[m][0] * even);
                scale_sum(sum[m][i + 1], products[m][i + 1], scale[m][0] * odd);
                scale_sum(sum[m][i + 2], products[m][i + 2], scale[m][1] * even);
                scale_sum(sum[m][i + 3], products[m][i + 3], scale[m][1] * odd);
            }
        }
#endif
#if ADAPTERS
#pragma unroll 1
        for (int unit = max(s.first - a.pieces, 0); unit < min(s.last - a.pieces, units); ++unit) multiply_left(sum, reader);
        wgmma_wait<0>();
#if MULTICAST > 1
        for (int unit = max(s.first - a.pieces, units); unit < min(s.last - a.pieces, most_left_units(a, s)); ++unit) {
            reader.at.wait_full();
            reader.release_previous();
            reader.at.advance();
        }
#endif
#endif
        if (s.last < work.pieces) {
            write_part(a.parts + (size_t)blockIdx.x * PART + threadIdx.x, sum);
            wait_named(2 + group, 128);
            if (threadIdx.x % 128 == 0) store_release(a.ready + blockIdx.x * WARPGROUPS + group, 1);
            continue;
        }
        // The blocks ahead of this one have computed what precedes its share.
        for (int block = blockIdx.x, left = s.first; left > 0;) {
            block -= MULTICAST;
            left = work.share(a, block / MULTICAST) - s.tile * work.pieces;
            u32* const ready = a.ready + block * WARPGROUPS + group;
            if (threadIdx.x % 128 == 0) wait_until_set(ready);
            wait_named(2 + group, 128);
            add_part(a.parts + (size_t)block * PART + threadIdx.x, sum);
            wait_named(2 + group, 128);
            if (threadIdx.x % 128 == 0) *ready = 0;
        }
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int from = 0; from < TOKENS; from += OUTPUTS) {
                if (threadIdx.x % 128 == 0) wait_until_boxes_are_read();
                wait_named(2 + group, 128);
#pragma unroll
                for (int b = 0; b < OUTPUTS / 8; ++b) output.stage(sum[m], from / 8 + b, b, bias[m][0], bias[m][1], warp % 4, lane);
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                wait_named(2 + group, 128);
                output.write((block_tile + (group * ROW_TILES + m) * 4) * 16, token + from);
            }
        }
    }
    if (!a.wait_first && threadIdx.x == 0) let_next_launch_begin();
    if (threadIdx.x % 128 == 0) wait_until_boxes_are_stored();
#if MULTICAST > 1
    // What the other block brings, and says, must find this one still there.
    __syncwarp();
    cluster_sync();
#endif
}
