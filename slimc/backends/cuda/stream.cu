// y = scale * (x @ W^T) + t @ L^T + bias on Hopper, for up to 128 tokens, or 256 as two tiles: as fast as the weight comes from memory.
//
// The copy engine brings weights to shared memory in the order of their use, in a ring of slots, and in another ring the
// activations that meet them. Weights do not depend on the launch before: a block fills their ring while that still runs,
// so that memory is busy between launches too. Warps take their codes from the ring, turn them into numbers in
// registers, and multiply by activations with `wgmma`, or `wgmma.sp` if the weight is 2:4.
//
// A block computes 64 * ROW_TILES * ROW_GROUPS rows of TOKENS tokens, or a cluster of blocks does, each of which takes its
// share of the columns; in a block, COLUMN_GROUPS warpgroups take turns at the slots. Each sends its sums to the block that
// writes them, which adds them up in a fixed order.
// Blocks that share the columns need not be a cluster: BY_MEMORY, they exchange sums through device memory. Each keeps those
// of its own pieces of the tile, and adds to them what the others have. It waits for these, but not for ever: they may not
// be running, if other launches hold the multiprocessors. Then the last one adds up its pieces.
// Where there are more tiles than multiprocessors, and whole rounds of them would leave some idle, the blocks of an EVEN launch
// divide the slots of all tiles among them, each the same number, no less than a tile has: a block computes the beginning
// of one tile, perhaps whole ones, and the end of another. What it has of the first it hands on, through device memory, to the
// block that ends it.
// t = x @ R^T, the small product, is this kernel's own result in a launch before. That one says when x may be read
// (`flags`): W is multiplied while t is still under way, and only L waits for it.
//
// Compiled with -D, besides those of common.cuh and hopper.cuh:
//   SPARSE     1: W is 2:4; 0: W is dense
//   GROUP      columns of W that share a scale, 0: all of a row
//   VALUES     1: W is 16-bit values, with no GROUP; 0: it is 4-bit codes
//   ADAPTERS   1: with t and L
//   ROW_TILES      tiles of 64 rows that a warpgroup holds at once
//   ROW_GROUPS     warpgroups with rows of their own
//   COLUMN_GROUPS  warpgroups that share the columns of the same rows
//   STEP           columns of a slot: 128 or 256
//   STAGES         slots of the ring of weights
//   INPUTS         slots of the ring of activations, no more than STAGES
//   CLUSTER        blocks that share the columns
//   BY_MEMORY      1: they exchange their sums through device memory, and are not launched as a cluster
//   HALVES         1: as float16, of an exponent that all have in common which a thread hands over; 0: as float32
//   REGISTERS      of a thread that multiplies, FEW_REGISTERS of others; together no more than a block has at its start.
//                  0: all keep what they have
//   PART_BYTES     of memory for the sums that a block hands to others, if BY_MEMORY or EVEN
//   EVEN           1: all blocks of the launch, no more than tiles, share the slots of all tiles; CLUSTER and COLUMN_GROUPS are 1
//   BRINGERS       warps that bring what the others read: 1, or 2
//   BLOCKS         blocks that a multiprocessor can hold at once, of this launch and those around it

#if STAGES % COLUMN_GROUPS || INPUTS % COLUMN_GROUPS || INPUTS > STAGES
#error "a slot must always meet the same warpgroup, and weights are ahead: see LaunchShape.stages_of"
#endif
#if EVEN && (CLUSTER > 1 || COLUMN_GROUPS > 1)
#error "slots of the next tile come while sums of this one are added up: there is no other room for them"
#endif
#if BY_MEMORY && (EVEN || CLUSTER == 1 || COLUMN_GROUPS > 1)
#error "blocks that share a tile in device memory have one part of it each"
#endif
#define CONSUMERS (128 * ROW_GROUPS * COLUMN_GROUPS)
#define MEMBERS 8  // of a stack, at most
// Two more warps may bring what they read, weights and activations: weights then never wait for either's barriers but
// their own. Else one does both, and leaves its registers to those that multiply. They are part of a warpgroup, if that hands
// registers to those that multiply.
#define THREADS (CONSUMERS + (REGISTERS > 0 ? 128 : 32 * BRINGERS))
#define BLOCK_TILES (4 * ROW_TILES * ROW_GROUPS)  // tiles of 16 rows
#define UNIT (SPARSE ? 128 : 64)                  // columns of W whose codes lie together
#define UNITS (STEP / UNIT)                       // of W in a slot
#define LEFT_UNITS (STEP / 128)                   // of L in a slot, 64 ranks each
#if LEFT_UNITS > 2
#error "the last slot of L has all of its units, or one less"
#endif

#define BOX_BYTES (TOKENS * 128)  // 64 columns of activations
#define BOXES (STEP / 64)
#define INPUT_BYTES (BOXES * BOX_BYTES)
#define WORDS (VALUES ? 4 : 1)                    // of a lane, each of 16 bytes, in a unit
#define CODE_BYTES (BLOCK_TILES * UNITS * WORDS * 512)
#define METADATA_AT CODE_BYTES
#define METADATA_BYTES (SPARSE ? BLOCK_TILES * UNITS * 256 : 0)
#define SCALES_AT (METADATA_AT + METADATA_BYTES)
#define GROUPS (GROUP > 0 ? STEP / GROUP : 0)
#define SCALE_BYTES (BLOCK_TILES * GROUPS * 32)
#define SLOT_BYTES ((SCALES_AT + SCALE_BYTES + 127) / 128 * 128)

#define LEFT_CODE_BYTES (BLOCK_TILES * LEFT_UNITS * 512)
#define LEFT_SCALES_AT LEFT_CODE_BYTES
#define LEFT_SCALE_BYTES (BLOCK_TILES * LEFT_UNITS * 32)

#define EIGHTS (TOKENS / 8)          // of the tokens
#define PIECES (ROW_TILES * EIGHTS)  // of sums, each of 64 rows a row group by 8 tokens
#define PIECE_BYTES (128 * ROW_GROUPS * 16)
#define OWN_PIECES ((PIECES + CLUSTER - 1) / CLUSTER)  // that a block writes, at most
#define IN_CLUSTER (CLUSTER > 1 && !BY_MEMORY)
// Sums of many tokens that are sent to a block take the place of its rings, once all blocks of the cluster have read theirs.
// Those of few tokens are small and have room of their own.
#define SUMS_IN_RINGS (IN_CLUSTER && TOKENS >= 64)

struct Arguments {
    TensorMap x_map;           // activations [columns / 64][tokens][64], in boxes of BOXES x TOKENS x 64; or as they lie,
                               // [tokens][columns], in boxes of TOKENS x 64, if there are other than whole pieces of 64
    TensorMap t_map;           // t [ranks / 64][tokens][64], in boxes of LEFT_UNITS x TOKENS x 64
    TensorMap codes_map;       // [row tiles of 16][units][128 words], in boxes of BLOCK_TILES x UNITS x 128; if VALUES four of
                               // 128 words a unit, one for each instruction
    TensorMap metadata_map;    // [row tiles][units][64 words], if SPARSE
    TensorMap scale_map;       // [row tiles][groups][8 words], if GROUP
    TensorMap left_map;        // [row tiles][left units][128 words]
    TensorMap left_scale_map;  // [row tiles][left units][8 words]
    u16* y;                    // [tokens, rows]
    const u16* scale;          // [1] or [rows], unless GROUP
    const u16* bias;           // [rows] or null
    u32* flags;                // the mark of launches whose x may be read, and blocks that know; null without adapters
    void* parts;               // sums of shared tiles: [blocks][pieces][threads that multiply] float4, if EVEN; see SharedTile,
                               // if BY_MEMORY
    u32* shared;               // [tiles][row groups][2], 0 between launches: blocks that have written their sums, and << 16 a bit
                               // for each that has given up waiting; blocks that are done with the tile
    int tokens;
    int rows;
    int whole;                 // 1: columns are a multiple of 64
    int row_scale;             // 1: a scale a row, 0: one for all
    int steps;                 // slots of W
    int slots;                 // of a tile, with those of the widest L, if EVEN
    int token_tiles;           // tokens / TOKENS, rounded up
    int tiles;                 // of results, if EVEN
    u32 zero;                  // 0, which the compiler does not know
    u32 mark;                  // of this launch and that for t: what another left behind does not pass for it
    int window;                // slots of weights under way at once, at most: no more than STAGES, which parity cannot tell apart
    int turn;                  // slots of W that a block's first one is further on than that of the block before it
    int members;               // of the stack
    int first_block[MEMBERS];  // of each member of the stack
    int first_row[MEMBERS];
    int first_rank[MEMBERS];   // that its L reads
    int rank_units[MEMBERS];   // of 64, that it reads
};

// ------------------------------------------------------------------------------------------------------------ ring

template <int SLOTS, int BYTES>
struct Ring {
    u32 slots, full, empty;
    int slot, parity;

    __device__ __forceinline__ void advance(int by) {
        slot += by;
        if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
    }
    __device__ __forceinline__ u32 data() const { return slots + slot * BYTES; }
    __device__ __forceinline__ u32 arrived() const { return full + 8 * slot; }
    __device__ __forceinline__ u32 released() const { return empty + 8 * slot; }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * slot, parity); }
    __device__ __forceinline__ void wait_empty() const { barrier_wait(empty + 8 * slot, parity ^ 1); }
};
using Weights = Ring<STAGES, SLOT_BYTES>;
using Inputs = Ring<INPUTS, INPUT_BYTES>;

// What a block computes of a tile of results: slots of W from `begin` to `middle`, then those of L from `left` to `end`.
// Slots of L are counted on from those of W.
struct Segment {
    int row_tile, end_row, token, first_rank;
    int begin, middle, left, end;
    int turned;  // slots of W come in a circle, from this one of them on: blocks at the same columns would all ask the same memory
    bool whole;  // nobody else has a part in it
    bool half;   // its last slot of L has a unit less than others

    __device__ __forceinline__ bool empty() const { return begin == middle && left == end; }

    // Where a slot is in the row: of W, or of L after it.
    __device__ __forceinline__ int place(int step) const {
        if (step >= middle) return step;
        const int on = step + turned;
        return on < middle ? on : on - (middle - begin);
    }
};

// Tiles that a block computes, the last one first: what others wait for is done early, and L, which waits for t, late.
struct Work {
    const Arguments& a;
    int first, last;
#if EVEN
    int from, to;  // slots, counted through all tiles
#endif

    __device__ __forceinline__ explicit Work(const Arguments& a) : a(a) {
#if EVEN
        from = first_slot(blockIdx.x);
        to = first_slot(blockIdx.x + 1);
        first = from / a.slots;
        last = (to - 1) / a.slots;
#else
        first = last = blockIdx.x / CLUSTER;
#endif
    }

#if EVEN
    __device__ __forceinline__ int total() const { return a.tiles * a.slots; }
    __device__ __forceinline__ int first_slot(int block) const { return total() * block / (int)gridDim.x; }
    // Of a tile that is not all its own, the block has the beginning; else the end.
    __device__ __forceinline__ bool has_beginning(int tile) const { return from < tile * a.slots; }
#endif

    __device__ __forceinline__ Segment segment(int tile) const {
        Segment s = share_of(tile);
        s.turned = s.middle > s.begin ? (int)blockIdx.x * a.turn % (s.middle - s.begin) : 0;
        return s;
    }

    __device__ __forceinline__ Segment share_of(int tile) const {
        const int block = tile / a.token_tiles;
        // All rows of a block belong to one member of the stack.
        int member = 0;
        while (member + 1 < a.members && block >= a.first_block[member + 1]) ++member;
        const int ranks = ADAPTERS ? a.rank_units[member] : 0, slots = a.steps + (ranks + LEFT_UNITS - 1) / LEFT_UNITS;
        Segment s;
        s.row_tile = a.first_row[member] / 16 + (block - a.first_block[member]) * BLOCK_TILES;
        s.end_row = member + 1 < a.members ? a.first_row[member + 1] : a.rows;
        s.token = tile % a.token_tiles * TOKENS;
        s.first_rank = ADAPTERS ? a.first_rank[member] : 0;
#if EVEN
        const int before = tile * a.slots;
        s.begin = min(max(from - before, 0), slots);
        s.end = min(to - before, slots);
        s.whole = from <= before && to >= before + a.slots;
        s.middle = max(s.begin, min(s.end, a.steps));
        s.left = s.middle;
#elif TOKENS > 16
        divide(s, slots, blockIdx.x % CLUSTER, CLUSTER);
#else
        const int share = blockIdx.x % CLUSTER;
        s.begin = slots * share / CLUSTER;
        s.end = slots * (share + 1) / CLUSTER;
        s.whole = CLUSTER == 1;
        s.middle = max(s.begin, min(s.end, a.steps));
        s.left = s.middle;
#endif
        s.half = ranks % LEFT_UNITS && s.end == slots && s.left < s.end;
        return s;
    }

    // A share of W and one of L, so that nobody waits for who has all of L.
    __device__ __forceinline__ void divide(Segment& s, int slots, int share, int shares) const {
        const int units = slots - a.steps;
        s.begin = a.steps * share / shares;
        s.middle = a.steps * (share + 1) / shares;
        // From the other end: who has one slot of W more should have one of L less.
        s.left = a.steps + units - units * (share + 1) / shares;
        s.end = a.steps + units - units * share / shares;
        s.whole = shares == 1;
    }
};

// Slots of a block's work in their order.
struct Cursor {
    const Work& work;
    int tile, step;
    Segment at;

    __device__ __forceinline__ explicit Cursor(const Work& work) : work(work), tile(work.last), at(work.segment(work.last)) {
        step = at.begin;
        skip_empty();
    }
    __device__ __forceinline__ bool done() const { return tile < work.first; }
    __device__ __forceinline__ void advance() {
        ++step;
        skip_empty();
    }
    __device__ __forceinline__ void skip_empty() {
        while (step >= at.middle) {
            step = max(step, at.left);
            if (step < at.end || --tile < work.first) return;
            at = work.segment(tile);
            step = at.begin;
        }
    }
};

// What a block brings.
struct Source {
    const Arguments& a;

    // Brings the weights of a block, slot after slot.
    struct Bringer {
        const Source& source;
        Weights ring, arriving;  // the next slot, and the oldest of those under way
        Cursor slot;
        int count;

        __device__ __forceinline__ Bringer(const Source& source, const Work& work, const Weights& ring)
            : source(source), ring(ring), arriving(ring), slot(work), count(0) {}

        // The weights of a slot, once there is room for them.
        __device__ __forceinline__ void bring() {
            if (slot.done()) return;
            if (count++ >= source.a.window) {
                arriving.wait_full();
                arriving.advance(1);
            }
            ring.wait_empty();
            source.bring_weights(ring, slot);
            ring.advance(1);
            slot.advance();
        }
    };

    __device__ __forceinline__ void bring_weights(const Weights& ring, const Cursor& c) const {
        const u32 to = ring.data(), barrier = ring.arrived();
        const int step = c.step, tile = c.at.row_tile;
        const int place = c.at.place(step);
        if (!ADAPTERS || step < a.steps) {
            barrier_expect(barrier, CODE_BYTES + METADATA_BYTES + SCALE_BYTES);
            load_box(to, &a.codes_map, barrier, 0, place * UNITS * WORDS, tile);
#if SPARSE
            load_box(to + METADATA_AT, &a.metadata_map, barrier, 0, place * UNITS, tile);
#endif
#if GROUP > 0
            load_box(to + SCALES_AT, &a.scale_map, barrier, 0, place * GROUPS, tile);
#endif
        } else {
            barrier_expect(barrier, LEFT_CODE_BYTES + LEFT_SCALE_BYTES);
            load_box(to, &a.left_map, barrier, 0, (step - a.steps) * LEFT_UNITS, tile);
            load_box(to + LEFT_SCALES_AT, &a.left_scale_map, barrier, 0, (step - a.steps) * LEFT_UNITS, tile);
        }
    }

    __device__ __forceinline__ void bring_x(const Inputs& ring, const Cursor& c) const {
        const int place = c.at.place(c.step);
        barrier_expect(ring.arrived(), INPUT_BYTES);
        if (a.whole) {
            load_box(ring.data(), &a.x_map, ring.arrived(), 0, c.at.token, place * BOXES);
        } else {
#pragma unroll
            for (int i = 0; i < BOXES; ++i)
                load_box(ring.data() + i * BOX_BYTES, &a.x_map, ring.arrived(), place * STEP + i * 64, c.at.token);
        }
    }

    __device__ __forceinline__ void bring_t(const Inputs& ring, const Cursor& c) const {
        barrier_expect(ring.arrived(), LEFT_UNITS * BOX_BYTES);
        load_box(ring.data(), &a.t_map, ring.arrived(), 0, c.at.token, c.at.first_rank / 64 + (c.step - a.steps) * LEFT_UNITS);
    }

    // Weights go ahead of activations as far as their ring reaches.
    __device__ __forceinline__ void run(const Work& work, const Weights& weights, const Inputs& inputs) const {
        Bringer next(*this, work, weights);
        for (int i = 0; i < STAGES; ++i) next.bring();
        int used = 0;
        run_inputs(work, inputs, [&] {
            // Who has released the activations of a step has the weights of the next one in registers.
            if (++used >= INPUTS) next.bring();
        });
    }

    __device__ __forceinline__ void run_weights(const Work& work, const Weights& weights) const {
        for (Bringer next(*this, work, weights); !next.slot.done();) next.bring();
    }

    __device__ __forceinline__ void prefetch_maps_of_weights() const {
        prefetch_map(&a.codes_map);
        if (SPARSE) prefetch_map(&a.metadata_map);
        if (GROUP > 0) prefetch_map(&a.scale_map);
        if (ADAPTERS) {
            prefetch_map(&a.left_map);
            prefetch_map(&a.left_scale_map);
        }
    }

    template <typename AfterEach>
    __device__ __forceinline__ void run_inputs(const Work& work, Inputs ring, AfterEach after_each) const {
        prefetch_map(&a.x_map);
#if ADAPTERS
        prefetch_map(&a.t_map);
        while (load_acquire(a.flags) != a.mark) {}
        bool waits = true;
#else
        wait_for_previous_launch();
        if (a.flags && blockIdx.x == 0) store_release(a.flags, a.mark);
#endif
        asm volatile("fence.proxy.async.global;" ::: "memory");
        for (Cursor now(work); !now.done(); now.advance(), ring.advance(1)) {
            ring.wait_empty();
#if ADAPTERS
            if (now.step >= a.steps) {
                if (waits) {
                    wait_for_previous_launch();
                    asm volatile("fence.proxy.async.global;" ::: "memory");
                    waits = false;
                }
                bring_t(ring, now);
            } else
#endif
                bring_x(ring, now);
            after_each();
        }
#if ADAPTERS
        if (waits) wait_for_previous_launch();
        if (atomicAdd(a.flags + 1, 1) == gridDim.x - 1) a.flags[0] = a.flags[1] = 0;
#endif
    }
};

// --------------------------------------------------------------------------------------------------------- products

__device__ __forceinline__ float4 load_shared_sums(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

// Operands in registers must stay as they are until the products that read them are done: two sets take turns, also
// from one slot to the next, which takes an even number of them. Where registers are few a set holds one product.
#define BATCH (ROW_TILES > 2 || BLOCKS > 2 || BLOCKS * THREADS > 1024 || (ROW_TILES * TOKENS >= 128 && THREADS > 512) || (REGISTERS > 0 && ROW_TILES > 1) || (TOKENS <= 16 && ROW_TILES > 1 && COLUMN_GROUPS > 1) ? 1 : 2)

// One warpgroup's part of the product.
struct Multiplier {
    Weights weights;
    Inputs inputs;
    int row_group, warp, lane;
    int previous;  // slot of activations whose products may still run, or -1
    u32 zero;

    // Place of the warp's tile `m` among the block's tiles of 16 rows.
    __device__ __forceinline__ int place(int m) const { return (row_group * ROW_TILES + m) * 4 + warp; }

    // What a warp reads of a slot is in its registers: `seen` is made of all of it, so that the assembler waits for the last
    // load. A load that was only asked for may come after the copy engine's next box, where a warp of its own brings weights
    // as soon as a slot is released.
    __device__ __forceinline__ void release_weights(u32 seen) {
        __syncwarp();
        barrier_arrive_if(lane == 0, weights.released() + (seen & zero));
        weights.advance(COLUMN_GROUPS);
    }

    // All products but those of the last batch are done; so are those with the slot before.
    __device__ __forceinline__ void end_batch(bool first_of_slot) {
        wgmma_commit();
        wgmma_wait<1>();
        // Without a branch: products on both sides of one would run one after another.
        if (first_of_slot) barrier_arrive_if(previous >= 0 && lane == 0, inputs.empty + 8 * previous);
    }

    __device__ __forceinline__ void next_slot() {
        previous = inputs.slot;
        inputs.advance(COLUMN_GROUPS);
    }

#if VALUES
    // In registers of their own: products read them when the next values have long been loaded.
    __device__ __forceinline__ void take(u32 (&of)[4], const uint4& values) const {
        of[0] = values.x ^ zero, of[1] = values.y ^ zero, of[2] = values.z ^ zero, of[3] = values.w ^ zero;
    }
#endif

    __device__ __forceinline__ void multiply_weights(float (&sum)[ROW_TILES][SUMS]) {
        u32 of[2][BATCH][ROW_TILES][4];
        uint4 codes[UNITS * WORDS][ROW_TILES];
#if SPARSE
        u32 indices[2][BATCH][ROW_TILES];
        uint2 metadata[UNITS][ROW_TILES];
#endif
#if GROUP > 0
        u32 scales[GROUPS][ROW_TILES];
#endif
        weights.wait_full();
        const u32 data = weights.data();
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < UNITS * WORDS; ++i) {
                codes[i][m] = load_shared_words(data + (place(m) * UNITS * WORDS + i) * 512 + lane * 16);
#if SPARSE
                const int u = i / WORDS;
                if (i % WORDS == 0) metadata[u][m] = load_shared_pair(data + METADATA_AT + (place(m) * UNITS + u) * 256 + lane * 8);
#endif
            }
#if GROUP > 0
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
                scales[g][m] = load_shared_word(data + SCALES_AT + ((place(m) * GROUPS + g) * 8 + lane / 4) * 4);
#endif
        }
        u32 seen = 0;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < UNITS * WORDS; ++i) {
                seen |= codes[i][m].w;
#if SPARSE
                if (i % WORDS == 0) seen |= metadata[i / WORDS][m].y;
#endif
            }
#if GROUP > 0
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) seen |= scales[g][m];
#endif
        }
        release_weights(seen);
        const u32 boxes = inputs.data();
#pragma unroll
        for (int batch = 0; batch < 4 * UNITS / BATCH; ++batch) {
            const int set = batch & 1;
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int u = (batch * BATCH + i) / 4, j = (batch * BATCH + i) % 4;
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#if VALUES
                    take(of[set][i][m], codes[u * WORDS + j][m]);
#else
                    decode_word(of[set][i][m], word_of(codes[u][m], j));
#endif
#if SPARSE
                    // Straight from a load the assembler would let no two products overlap.
                    indices[set][i][m] = (j < 2 ? metadata[u][m].x : metadata[u][m].y) ^ zero;
#endif
#if GROUP > 0
                    apply_scales(of[set][i][m], scales[(u * UNIT + j * (UNIT / 4)) / GROUP][m]);
#endif
                }
            }
            if (batch == 0) inputs.wait_full();
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int u = (batch * BATCH + i) / 4, j = (batch * BATCH + i) % 4, column = u * UNIT + j * (UNIT / 4);
                const u64 box = describe(boxes + column / 64 * BOX_BYTES + column % 64 * 2);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#if SPARSE
                    if (j & 1) wgmma_sparse<1>(sum[m], of[set][i][m], box, indices[set][i][m]);
                    else wgmma_sparse<0>(sum[m], of[set][i][m], box, indices[set][i][m]);
#else
                    wgmma(sum[m], of[set][i][m], box);
#endif
                }
            }
            end_batch(batch == 0);
        }
        next_slot();
    }

#if ADAPTERS
    template <int COUNT>
    __device__ __forceinline__ void multiply_left(float (&sum)[ROW_TILES][SUMS]) {
        u32 of[2][BATCH][ROW_TILES][4];
        uint4 codes[COUNT][ROW_TILES];
        u32 scales[COUNT][ROW_TILES];
        weights.wait_full();
        const u32 data = weights.data();
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int u = 0; u < COUNT; ++u) {
                codes[u][m] = load_shared_words(data + (place(m) * LEFT_UNITS + u) * 512 + lane * 16);
                scales[u][m] = load_shared_word(data + LEFT_SCALES_AT + ((place(m) * LEFT_UNITS + u) * 8 + lane / 4) * 4);
            }
        }
        u32 seen = 0;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int u = 0; u < COUNT; ++u) seen |= codes[u][m].w | scales[u][m];
        release_weights(seen);
        const u32 boxes = inputs.data();
#pragma unroll
        for (int batch = 0; batch < 4 * COUNT / BATCH; ++batch) {
            const int set = batch & 1;
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int u = (batch * BATCH + i) / 4, j = (batch * BATCH + i) % 4;
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    decode_word(of[set][i][m], word_of(codes[u][m], j));
                    apply_scales(of[set][i][m], scales[u][m]);
                }
            }
            if (batch == 0) inputs.wait_full();
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int u = (batch * BATCH + i) / 4, j = (batch * BATCH + i) % 4;
                const u64 box = describe(boxes + u * BOX_BYTES + j * 32);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) wgmma(sum[m], of[set][i][m], box);
            }
            end_batch(batch == 0);
        }
        next_slot();
    }
#endif
};

// Wait for all products. The compiler must not touch the sums before: it does not know that they are still written.
__device__ __forceinline__ void wait_for_sums(float (&sum)[ROW_TILES][SUMS]) {
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[m][i])::"memory");
}

// What a warpgroup sums up of a segment: its share of the slots, if several take turns.
__device__ __forceinline__ void compute_sums(const Arguments& a, const Segment& s, Multiplier& by, int column_group, float (&sum)[ROW_TILES][SUMS]) {
#if GROUP == 0
    // Asked for before they are needed: they come from device memory.
    float scales[ROW_TILES][2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const int row = s.row_tile * 16 + (by.row_group * ROW_TILES + m) * 64 + by.warp * 16 + by.lane / 4;
        scales[m][0] = to_float(a.scale[a.row_scale && row < a.rows ? row : 0]);
        scales[m][1] = to_float(a.scale[a.row_scale && row + 8 < a.rows ? row + 8 : 0]);
    }
#endif
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sum[m][i] = 0.f;
    const int of_weights = s.middle - s.begin;
    int slot = column_group;
    for (; slot < of_weights; slot += COLUMN_GROUPS) by.multiply_weights(sum);
    wait_for_sums(sum);
#if GROUP == 0
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
            sum[m][i] *= scales[m][0];
            sum[m][i + 1] *= scales[m][0];
            sum[m][i + 2] *= scales[m][1];
            sum[m][i + 3] *= scales[m][1];
        }
    }
#endif
#if ADAPTERS
    const int of_both = of_weights + s.end - s.left;
    for (; slot < of_both - s.half; slot += COLUMN_GROUPS) by.multiply_left<LEFT_UNITS>(sum);
#if LEFT_UNITS > 1
    for (; slot < of_both; slot += COLUMN_GROUPS) by.multiply_left<LEFT_UNITS - 1>(sum);
#endif
    wait_for_sums(sum);
#endif
}

// ----------------------------------------------------------------------------------------------------------- output

__device__ __forceinline__ float4 load_part(const float4* from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

// What a thread has summed of 8 tokens.
__device__ __forceinline__ float4 piece_of(const float (&sum)[ROW_TILES][SUMS], int piece) {
    const float* const s = sum[piece / EIGHTS] + 4 * (piece % EIGHTS);
    return make_float4(s[0], s[1], s[2], s[3]);
}

// Never as one instruction with the product before: where that is done must not make a difference.
__device__ __forceinline__ void add(float4& s, const float4& v) {
    s = make_float4(__fadd_rn(s.x, v.x), __fadd_rn(s.y, v.y), __fadd_rn(s.z, v.z), __fadd_rn(s.w, v.w));
}

// Send sums of a thread to the block that writes them.
__device__ __forceinline__ void send_sums(u32 to, u32 barrier, int block, const float4& s) {
    asm volatile("{\n.reg .b32 there, arrived;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 arrived, %1, %2;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [arrived];\n}"
                 ::"r"(to), "r"(barrier), "r"(block), "r"(__float_as_uint(s.x)), "r"(__float_as_uint(s.y)), "r"(__float_as_uint(s.z)),
                   "r"(__float_as_uint(s.w)) : "memory");
}

__device__ __forceinline__ void store_shared_sums(u32 to, const float4& s) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(s.x), "f"(s.y), "f"(s.z), "f"(s.w) : "memory");
}

// What `count` sources have summed of one piece, in their order.
__device__ __forceinline__ float4 add_up(u32 from, int count, u32 step) {
    float4 s = load_shared_sums(from);
    for (int i = 1; i < count; ++i) add(s, load_shared_sums(from + i * step));
    return s;
}

// Where a piece of a warp's results is: 16 rows, of which those before `end_row` are written, by 8 tokens.
struct Place {
    int first_row, first_token;
};

// A piece lies as a fragment, a row in four lanes; memory wants the rows of a token together. Several pieces at once: each step
// waits for the one before.
template <int COUNT, typename PlaceOf>
__device__ __forceinline__ void write_results(const Arguments& a, const float4 (&sums)[COUNT], int end_row, int lane, PlaceOf place_of) {
    u32 low[COUNT], high[COUNT];  // two rows of a token, and two that are 8 further on
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float4& s = sums[i];
        const int row = place_of(i).first_row + lane / 4;
        const float bias = a.bias && row < end_row ? to_float(a.bias[row]) : 0.f;
        const float bias_on = a.bias && row + 8 < end_row ? to_float(a.bias[row + 8]) : 0.f;
        low[i] = from_float(s.x + bias) | (u32)from_float(s.y + bias) << 16;
        high[i] = from_float(s.z + bias_on) | (u32)from_float(s.w + bias_on) << 16;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) low[i] = transposed(low[i]), high[i] = transposed(high[i]);
    // The neighbour has the two rows that come next to either.
    const bool odd = lane & 1;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const u32 others = __shfl_xor_sync(~0u, odd ? low[i] : high[i], 1);
        low[i] = odd ? others : low[i];
        high[i] = odd ? high[i] : others;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int row = place_of(i).first_row + (lane & 2) * 2 + (odd ? 8 : 0), token = place_of(i).first_token + lane / 4;
        if (token >= a.tokens) continue;
        u16* const to = a.y + (size_t)token * a.rows + row;
        if (a.rows % 4 == 0 && row + 4 <= end_row) {
            *(uint2*)to = make_uint2(low[i], high[i]);
        } else {
            if (row < end_row) to[0] = (u16)low[i];
            if (row + 1 < end_row) to[1] = (u16)(low[i] >> 16);
            if (row + 2 < end_row) to[2] = (u16)high[i];
            if (row + 3 < end_row) to[3] = (u16)(high[i] >> 16);
        }
    }
}

// All that a warp has summed of a tile that is the block's own.
__device__ __forceinline__ void write_tile(const Arguments& a, const float (&sum)[ROW_TILES][SUMS], const Segment& s, int first_row, int lane) {
    constexpr int AT_ONCE = EIGHTS < 4 ? EIGHTS : 4;
#pragma unroll
    for (int first = 0; first < PIECES; first += AT_ONCE) {
        float4 pieces[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) pieces[i] = piece_of(sum, first + i);
        write_results(a, pieces, s.end_row, lane, [&](int i) {
            return Place{first_row + (first + i) / EIGHTS * 64, s.token + (first + i) % EIGHTS * 8};
        });
    }
}

#if EVEN
// Hands the sums of a tile, of which the block has the beginning, to the next block, which has the end of it.
struct Handover {
    const Arguments& a;
    int tile, row_group, thread;

    static constexpr size_t PART = PIECES * CONSUMERS;
    static_assert(PART * sizeof(float4) == PART_BYTES);

    __device__ __forceinline__ bool speaks() const { return threadIdx.x % 128 == 0; }
    __device__ __forceinline__ u32* is_there() const { return a.shared + (tile * ROW_GROUPS + row_group) * 2; }

    __device__ __forceinline__ void give(const float (&sum)[ROW_TILES][SUMS]) const {
        float4* const part = (float4*)a.parts + blockIdx.x * PART + thread;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) part[piece * CONSUMERS] = piece_of(sum, piece);
        wait_named(1 + row_group, 128);
        if (speaks()) store_release(is_there(), 1);
    }

    __device__ __forceinline__ void take(float (&sum)[ROW_TILES][SUMS]) const {
        if (speaks()) {
            // Blocks start in the order of their numbers, and begin with what they hand on: the one before has done so, or will.
            while (load_acquire(is_there()) == 0) {}
            *is_there() = 0;
        }
        wait_named(1 + row_group, 128);
        const float4* const part = (const float4*)a.parts + (blockIdx.x - 1) * PART + thread;
        constexpr int AT_ONCE = EIGHTS < 8 ? EIGHTS : 8;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece += AT_ONCE) {
            float4 v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) v[i] = load_part(part + (piece + i) * CONSUMERS);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                float* const s = sum[(piece + i) / EIGHTS] + 4 * ((piece + i) % EIGHTS);
                s[0] += v[i].x; s[1] += v[i].y; s[2] += v[i].z; s[3] += v[i].w;
            }
        }
    }
};
#endif

#if BY_MEMORY
#ifndef PATIENCE
#define PATIENCE 1000  // looks at what others have done
#endif

__device__ __forceinline__ u32 add_here_and_there(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

// Blocks, a bit each, whose parts of a tile this one adds up, if all have written theirs before it loses its patience:
// itself; if it was the last, those that have given up too. `before` are those that had written theirs before it did.
__device__ __forceinline__ u32 wait_for_others(const u32* state, u32 before, int share, int blocks) {
    if ((before & 0xffff) == blocks - 1) return before >> 16 | 1 << share;
    for (int looks = 0; looks < PATIENCE; ++looks)
        if ((load_acquire(state) & 0xffff) == blocks) return 1 << share;
    return 0;
}

// Leave what this block has to add up to the last one that writes its part; or not, if all have done so by now.
__device__ __forceinline__ u32 give_up(u32* state, int share, int blocks) {
    u32 last;
    asm volatile("atom.acq_rel.gpu.global.or.b32 %0, [%1], %2;" : "=r"(last) : "l"(state), "r"(0x10000 << share) : "memory");
    return (last & 0xffff) == blocks ? 1 << share : 0;
}

// What is handed over of a piece.
#if HALVES
using Handed = uint2;
__device__ __forceinline__ Handed load_handed(const Handed* from) {
    Handed v;
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}
#else
using Handed = float4;
__device__ __forceinline__ Handed load_handed(const Handed* from) { return load_part(from); }
#endif

// The numbers that a thread hands over times a power of two: the largest that is finite is below 2^15 then, and others have all 11
// bits of float16, three more than those of a result in bfloat16, down to 2^-28 of it. Rows beyond the layer's count, too: they
// are as large as others.
struct Scaling {
    float up = 1.f, down = 1.f;

    static __device__ __forceinline__ float larger(float largest, const float4& v) {
        return fmaxf(fmaxf(fmaxf(largest, fabsf(v.x)), fmaxf(fabsf(v.y), fabsf(v.z))), fabsf(v.w));
    }
    static __device__ __forceinline__ float larger_finite(float largest, const float4& v) {
        auto finite = [](float f) { return fabsf(f) < __int_as_float(0x7f800000) ? f : 0.f; };
        return larger(largest, make_float4(finite(v.x), finite(v.y), finite(v.z), finite(v.w)));
    }

#if HALVES
    __device__ __forceinline__ explicit Scaling(float largest) {
        const u32 exponent = max(__float_as_uint(largest) >> 23, 15u);
        up = __uint_as_float((268 - exponent) << 23);
        down = __uint_as_float((exponent - 14) << 23);
    }
    static __device__ __forceinline__ u32 pair(float low, float high) {
        u32 v;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    static __device__ __forceinline__ float2 both(u32 v) {
        float low, high;
        asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(low), "=f"(high) : "r"(v));
        return make_float2(low, high);
    }
    __device__ __forceinline__ Handed pack(const float4& v) const {
        return make_uint2(pair(v.x * up, v.y * up), pair(v.z * up, v.w * up));
    }
    static __device__ __forceinline__ float4 unpack(const Handed& v, float down) {
        const float2 first = both(v.x), second = both(v.y);
        return make_float4(first.x * down, first.y * down, second.x * down, second.y * down);
    }
#else
    __device__ __forceinline__ explicit Scaling(float) {}
    __device__ __forceinline__ Handed pack(const float4& v) const { return v; }
    static __device__ __forceinline__ float4 unpack(const Handed& v, float) { return v; }
#endif
};

// A tile's sums, whose pieces are shared out among the blocks that have parts of them: each keeps its own in registers, hands
// the others to their blocks, and adds up what these hand to it.
struct SharedTile {
    const Arguments& a;
    const Segment& segment;
    int row_group, warp, lane;

    // In memory of a block: what it hands over, [pieces][threads that multiply]; its own pieces, if it does not wait for the others;
    // and the power of two by which each thread's numbers are multiplied back.
    static constexpr size_t KEPT_AT = sizeof(Handed) * PIECES * CONSUMERS, POWERS_AT = KEPT_AT + sizeof(float4) * OWN_PIECES * CONSUMERS;
    static constexpr size_t BYTES = POWERS_AT + sizeof(float) * CONSUMERS;
    static_assert(BYTES == PART_BYTES);

    __device__ __forceinline__ int share() const { return blockIdx.x % CLUSTER; }
    static __device__ __forceinline__ constexpr int first_piece(int share) { return PIECES * share / CLUSTER; }
    __device__ __forceinline__ bool speaks() const { return threadIdx.x % 128 == 0; }
    __device__ __forceinline__ u32* state() const { return a.shared + (blockIdx.x / CLUSTER * ROW_GROUPS + row_group) * 2; }
    template <typename T>
    __device__ __forceinline__ T* memory(int share, size_t at, int piece) const {
        T* const of_block = (T*)((char*)a.parts + (blockIdx.x / CLUSTER * CLUSTER + share) * BYTES + at);
        return of_block + piece * CONSUMERS + row_group * 128 + threadIdx.x % 128;
    }
    __device__ __forceinline__ Handed* handed(int share, int piece) const { return memory<Handed>(share, 0, piece); }
    __device__ __forceinline__ float4* kept(int share, int i) const { return memory<float4>(share, KEPT_AT, i); }
    __device__ __forceinline__ float* power(int share) const { return memory<float>(share, POWERS_AT, 0); }
    __device__ __forceinline__ float power_of(int share) const {
        float v = 1.f;
#if HALVES
        asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(power(share)) : "memory");
#endif
        return v;
    }
    __device__ __forceinline__ Place place_of(int piece) const {
        return {(segment.row_tile + (row_group * ROW_TILES + piece / EIGHTS) * 4 + warp) * 16, segment.token + piece % EIGHTS * 8};
    }

    template <int SHARE = 0>
    __device__ __forceinline__ void hand_over(const float (&sum)[ROW_TILES][SUMS], float4 (&own)[OWN_PIECES]) const {
        if constexpr (SHARE < CLUSTER) {
            if (share() != SHARE) return hand_over<SHARE + 1>(sum, own);
            auto is_own = [](int piece) { return piece >= first_piece(SHARE) && piece < first_piece(SHARE + 1); };
            float largest = 0.f;
#if HALVES
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece)
                if (!is_own(piece)) largest = Scaling::larger(largest, piece_of(sum, piece));
            // One token that overflows must not cost the others their bits.
            if (largest == __int_as_float(0x7f800000)) {
                largest = 0.f;
#pragma unroll
                for (int piece = 0; piece < PIECES; ++piece)
                    if (!is_own(piece)) largest = Scaling::larger_finite(largest, piece_of(sum, piece));
            }
#endif
            const Scaling scaling(largest);
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                const float4 v = piece_of(sum, piece);
                if (is_own(piece)) own[piece - first_piece(SHARE)] = v;
                else *handed(SHARE, piece) = scaling.pack(v);
            }
            if (HALVES) *power(SHARE) = scaling.down;
        }
    }

    // Call `f` with the own pieces and their places among these.
    template <typename F>
    __device__ __forceinline__ void for_own_pieces(F f) const {
#pragma unroll
        for (int i = 0; i < OWN_PIECES; ++i)
            if (first_piece(share()) + i < first_piece(share() + 1)) f(first_piece(share()) + i, i);
    }

    // Add the others' parts to the own ones, in the order of the blocks, and write the results.
    __device__ __forceinline__ void add_up(float4 (&own)[OWN_PIECES]) const {
        Handed others[CLUSTER - 1][OWN_PIECES];
        float powers[CLUSTER - 1];
#pragma unroll
        for (int other = 0; other < CLUSTER - 1; ++other) {
            const int from = other + (other >= share());
            powers[other] = power_of(from);
            for_own_pieces([&](int piece, int i) { others[other][i] = load_handed(handed(from, piece)); });
        }
        for_own_pieces([&](int, int i) {
#pragma unroll
            for (int other = 0; other < CLUSTER - 1; ++other) add(own[i], Scaling::unpack(others[other][i], powers[other]));
        });
        const int first = first_piece(share()), end = first_piece(share() + 1);
        write_results(a, own, segment.end_row, lane, [&](int i) { return first + i < end ? place_of(first + i) : Place{segment.end_row, 0}; });
    }

    // The same for a block that has not waited: all parts are in memory.
    __device__ __forceinline__ void add_up_for(int share) const {
        for (int piece = first_piece(share); piece < first_piece(share + 1); ++piece) {
            float4 v[1] = {load_part(kept(share, piece - first_piece(share)))};
            for (int other = 0; other < CLUSTER - 1; ++other) {
                const int from = other + (other >= share);
                add(v[0], Scaling::unpack(load_handed(handed(from, piece)), power_of(from)));
            }
            write_results(a, v, segment.end_row, lane, [&](int) { return place_of(piece); });
        }
    }

    // Blocks, a bit each, whose pieces this one adds up, once it may.
    __device__ __forceinline__ u32 wait(u32 before, const float4 (&own)[OWN_PIECES], volatile u32& taken) const {
        if (speaks()) taken = wait_for_others(state(), before, share(), CLUSTER);
        wait_named(1 + row_group, 128);
        if (taken) return taken;
        for_own_pieces([&](int piece, int i) { *kept(share(), i) = own[i]; });
        wait_named(1 + row_group, 128);
        if (speaks()) taken = give_up(state(), share(), CLUSTER);
        wait_named(1 + row_group, 128);
        return taken;
    }

    __device__ __forceinline__ void finish(const float (&sum)[ROW_TILES][SUMS], volatile u32& taken) const {
        float4 own[OWN_PIECES] = {};
        hand_over(sum, own);
        wait_named(1 + row_group, 128);
        const u32 before = speaks() ? add_here_and_there(state(), 1) : 0;
        const u32 mine = wait(before, own, taken);
        if (mine >> share() & 1) add_up(own);
        for (int other = 0; other < CLUSTER; ++other)
            if (other != share() && mine >> other & 1) add_up_for(other);
        // All that this warpgroup reads of the others' sums is in registers.
        wait_named(1 + row_group, 128);
        if (speaks() && atomicAdd(state() + 1, 1) == CLUSTER - 1) state()[0] = state()[1] = 0;
    }
};
#endif

// ------------------------------------------------------------------------------------------------------------ kernel

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) stream_linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 2 * INPUTS + 1];
#if BY_MEMORY
    __shared__ volatile u32 taken[ROW_GROUPS];  // what each warpgroup adds up of a tile
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = blockIdx.x % CLUSTER;
    const Work work(a);
    const u32 slots = (shared_address(shared) + 1023) & ~1023u;
    [[maybe_unused]] const u32 sums = slots + (SUMS_IN_RINGS ? (COLUMN_GROUPS > 1 ? COLUMN_GROUPS * PIECES * PIECE_BYTES : 0)
                                            : INPUTS * INPUT_BYTES + (STAGES * SLOT_BYTES + 1023) / 1024 * 1024);
    const u32 first_barrier = shared_address(barriers), arrived = first_barrier + 16 * (STAGES + INPUTS);
    const Weights weights{slots + INPUTS * INPUT_BYTES, first_barrier, first_barrier + 8 * STAGES, 0, 0};
    const Inputs inputs{slots, first_barrier + 16 * STAGES, first_barrier + 8 * (2 * STAGES + INPUTS), 0, 0};
    const int own = max(0, min(PIECES - share * OWN_PIECES, OWN_PIECES));

    if (threadIdx.x == CONSUMERS) Source{a}.prefetch_maps_of_weights();
    if (threadIdx.x == 0) {
        let_next_launch_begin();
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(weights.full + 8 * i, 1);
            barrier_init(weights.empty + 8 * i, 4 * ROW_GROUPS);
        }
        for (int i = 0; i < INPUTS; ++i) {
            barrier_init(inputs.full + 8 * i, 1);
            barrier_init(inputs.empty + 8 * i, 4 * ROW_GROUPS);
        }
        barrier_init(arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        if (IN_CLUSTER) barrier_expect(arrived, own * CLUSTER * PIECE_BYTES);
    }
    __syncthreads();
#if IN_CLUSTER && !SUMS_IN_RINGS
    // Sums may be sent to a block once its barrier is there.
    cluster_arrive();
#endif

    if (warp >= CONSUMERS / 32) {
#if REGISTERS > 0
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
#endif
        if (lane == 0) {
            const Source source{a};
            if (BRINGERS == 1 && warp == CONSUMERS / 32) source.run(work, weights, inputs);
            if (BRINGERS == 2 && warp == CONSUMERS / 32) source.run_weights(work, weights);
            if (BRINGERS == 2 && warp == CONSUMERS / 32 + 1) source.run_inputs(work, inputs, [] {});
        }
#if IN_CLUSTER
        __syncwarp();
        if (SUMS_IN_RINGS) cluster_arrive();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
#endif
        return;
    }

#if REGISTERS > 0
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
    const int row_group = warp / 4 % ROW_GROUPS, column_group = warp / 4 / ROW_GROUPS;
    [[maybe_unused]] const int thread = row_group * 128 + threadIdx.x % 128;
    Multiplier by{weights, inputs, row_group, warp % 4, lane, -1, a.zero};
    by.weights.advance(column_group);
    by.inputs.advance(column_group);
    float sum[ROW_TILES][SUMS];
#if EVEN
#pragma unroll 1
    for (int tile = work.last; tile >= work.first; --tile) {
        const Segment s = work.segment(tile);
        compute_sums(a, s, by, column_group, sum);
        // Activations come after launches that may still use the memory of the parts; who multiplies none waits for them itself.
        if (s.empty()) wait_for_previous_launch();
        const Handover handover{a, tile, row_group, thread};
        if (!s.whole && work.has_beginning(tile)) {
            handover.give(sum);
            continue;
        }
        if (!s.whole) handover.take(sum);
        const int first_row = (s.row_tile + row_group * ROW_TILES * 4 + warp % 4) * 16;
        write_tile(a, sum, s, first_row, lane);
    }
#elif BY_MEMORY
    const Segment s = work.segment(work.first);
    compute_sums(a, s, by, column_group, sum);
    // Activations come after launches that may still use the memory of the parts; who multiplies none waits for them itself.
    if (s.empty()) wait_for_previous_launch();
    SharedTile{a, s, row_group, warp % 4, lane}.finish(sum, taken[row_group]);
#else
    const Segment s = work.segment(work.first);
    const int first_row = (s.row_tile + row_group * ROW_TILES * 4 + warp % 4) * 16;
    compute_sums(a, s, by, column_group, sum);
#if !IN_CLUSTER && COLUMN_GROUPS == 1
    write_tile(a, sum, s, first_row, lane);
#else
    // A piece is 8 tokens of 64 rows of each row group.
    auto write_piece = [&](int piece, const float4& v) {
        const float4 pieces[1] = {v};
        write_results(a, pieces, s.end_row, lane, [&](int) { return Place{first_row + piece / EIGHTS * 64, s.token + piece % EIGHTS * 8}; });
    };
    // Hand on what this block has summed of one.
    auto deliver = [&](int piece, const float4& v) {
#if IN_CLUSTER
        send_sums(sums + (piece % OWN_PIECES * CLUSTER + share) * PIECE_BYTES + thread * 16, arrived, piece / OWN_PIECES, v);
#else
        write_piece(piece, v);
#endif
    };
#if IN_CLUSTER
    if (SUMS_IN_RINGS) cluster_arrive();
    cluster_wait();
#endif
#if COLUMN_GROUPS > 1
    // Where the rings were, once nobody reads them.
    wait_named(15, CONSUMERS);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
        store_shared_sums(slots + (column_group * PIECES + piece) * PIECE_BYTES + thread * 16, piece_of(sum, piece));
    wait_named(15, CONSUMERS);
    for (int piece = column_group; piece < PIECES; piece += COLUMN_GROUPS)
        deliver(piece, add_up(slots + piece * PIECE_BYTES + thread * 16, COLUMN_GROUPS, PIECES * PIECE_BYTES));
#else
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) deliver(piece, piece_of(sum, piece));
#endif
#if IN_CLUSTER
    // No block leaves before what it has sent is there.
    if (column_group < own) barrier_wait(arrived, 0);
    __syncwarp();
    cluster_arrive();
    for (int i = column_group; i < own; i += COLUMN_GROUPS)
        write_piece(share * OWN_PIECES + i, add_up(sums + i * CLUSTER * PIECE_BYTES + thread * 16, CLUSTER, PIECE_BYTES));
    cluster_wait();
#endif
#endif
#endif
}
