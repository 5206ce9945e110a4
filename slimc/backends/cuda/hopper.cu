// y = scale * (x @ W^T) + t @ L^T + bias on Hopper, for a few tokens to many thousands.
//
// The weight is the left operand of `wgmma`, or `wgmma.sp` if it is 2:4, and comes from registers: each lane loads its
// codes straight from device memory, in the order in which the tensor cores want them, and turns them into numbers while
// the product before runs. Activations are the right operand, from shared memory, where the copy engine puts them.
//
// A block computes 128 * ROW_TILES rows of TOKENS tokens, or a cluster of blocks does, each of which takes its share of
// the columns; their sums are then added in a fixed order. Two warpgroups multiply, a third brings activations: a branch of
// theirs between two products would make the assembler run one after the other.
// t = x @ R^T, the small product, is this kernel's own result in a launch before: W is under way while that runs.
//
// Compiled with -D, besides those of common.cuh:
//   SPARSE     1: W is 2:4; 0: W is dense
//   GROUP      columns of W that share a scale, 0: all of a row
//   ADAPTERS   1: with t and L
//   TOKENS     of a block: 8, 16, 32, 64, 128
//   ROW_TILES  tiles of 64 rows that a warpgroup holds at once
//   STAGES     pieces of 128 columns of activations in shared memory
//   AHEAD      pieces of the weight in flight in each warp, beside the one in use
//   CLUSTER    blocks that share the columns
//   MULTICAST  blocks, of other rows, that bring activations for each other; 1 if CLUSTER is not
//   BLOCKS     blocks that a multiprocessor can hold at once

#define WARPGROUPS 2  // that multiply
#define THREADS (128 * (WARPGROUPS + 1))
#define REGISTERS (BLOCKS == 1 ? 240 : 104)  // of a thread that multiplies: what a block has at its start, less 24 for each of the others
#define STEP 128   // columns of a piece
#define BLOCK_ROWS (64 * ROW_TILES * WARPGROUPS)
#define SLOT_BYTES (TOKENS * STEP * 2)
#define WINDOW 4   // pieces of the weight that are asked for at once

struct Arguments {
    TensorMap x_map;       // activations [tokens, columns], in boxes of TOKENS x 64
    TensorMap t_map;       // t [tokens, ranks], likewise
    u16* y;                // [tokens, rows]
    const uint4* codes;    // [row tiles of 16][units][lane]
    const uint2* metadata; // [row tiles of 16][units][lane], if SPARSE
    const u16* scale;      // [1], [rows]; with GROUP u32 [row tiles][groups][8]: rows g and g + 8
    const u16* bias;       // [rows] or null
    const uint4* left;     // [row tiles][left units][lane]
    const u32* left_scale; // [row tiles][left units][8]
    const int2* rank_range; // [row tiles]: first rank that a tile's L reads, and how many units of 64
    int tokens;
    int rows;
    int row_tiles;         // of 16 rows
    int units;             // of a row tile: columns / (SPARSE ? 128 : 64), rounded up
    int groups;            // of a row, if GROUP
    int row_scale;         // 1: a scale a row, 0: one for all
    int left_units;        // units of 64 ranks that a row of L has room for
    int steps;             // pieces of W
    int token_tiles;       // tokens / TOKENS, rounded up
    int wait_first;        // 1: x may still be written by the launch before
    u32 zero;              // 0, which the compiler does not know
};

// ------------------------------------------------------------------------------------------------- instructions

// Arrive at the barrier of the same place in another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, int block) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void load_box_everywhere(u32 to, const TensorMap* map, u32 barrier, int column, int token) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(token), "h"((u16)((1 << MULTICAST) - 1)) : "memory");
}

__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

__device__ __forceinline__ float4 load_of_block(u32 address, int block) {
    float4 v;
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote) : "memory");
    return v;
}

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// --------------------------------------------------------------------------------------------------------- weights

// One piece: 128 columns of 16 rows a warp, for each of its tiles.
struct Weights {
    uint4 codes[ROW_TILES][SPARSE ? 1 : 2];
#if SPARSE
    uint2 metadata[ROW_TILES];
#endif
#if GROUP > 0
    u32 scales[ROW_TILES][STEP / GROUP];
#endif
};

struct LeftWeights {
    uint4 codes[ROW_TILES][2];
    u32 scales[ROW_TILES][2];
};

// Where the lanes of a warp find their tiles. Rows that do not exist are those of the last tile again, and are not
// written; columns that do not exist meet activations of zero, which the copy engine puts there.
struct Source {
    const uint4* codes[ROW_TILES];
#if SPARSE
    const uint2* metadata[ROW_TILES];
#endif
#if GROUP > 0
    const u32* scales[ROW_TILES];
#endif
};

__device__ __forceinline__ Source find_weights(const Arguments& a, int tile, int lane) {
    Source from;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const size_t row_tile = min(tile + 4 * m, a.row_tiles - 1);
        from.codes[m] = a.codes + row_tile * a.units * 32 + lane;
#if SPARSE
        from.metadata[m] = a.metadata + row_tile * a.units * 32 + lane;
#endif
#if GROUP > 0
        from.scales[m] = (const u32*)a.scale + row_tile * a.groups * 8 + lane / 4;
#endif
    }
    return from;
}

__device__ __forceinline__ void load_weights(const Arguments& a, Weights& w, const Source& from, int step) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < (SPARSE ? 1 : 2); ++h) {
            const int unit = SPARSE ? step : min(2 * step + h, a.units - 1);
            w.codes[m][h] = load_once(from.codes[m] + unit * 32);
        }
#if SPARSE
        w.metadata[m] = load_once(from.metadata[m] + step * 32);
#endif
#if GROUP > 0
#pragma unroll
        for (int j = 0; j < STEP / GROUP; ++j)
            w.scales[m][j] = load_once(from.scales[m] + min(step * (STEP / GROUP) + j, a.groups - 1) * 8);
#endif
    }
}

// Ranks beyond a row's own are those of other rows: their scales are zero.
__device__ __forceinline__ void load_left(const Arguments& a, LeftWeights& w, int tile, int step, int units, int lane) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const size_t first = (size_t)min(tile + 4 * m, a.row_tiles - 1) * a.left_units;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int unit = 2 * step + h;
            const size_t at = first + min(unit, units - 1);
            w.codes[m][h] = load_once(a.left + at * 32 + lane);
            const u32 scales = load_once(a.left_scale + at * 8 + lane / 4);
            w.scales[m][h] = unit < units ? scales : 0;
        }
    }
}

// ------------------------------------------------------------------------------------------------------ main loops

// Pieces of activations go round in STAGES slots.
struct Pipeline {
    u32 slots, full, empty;
    int slot, parity;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ u32 data() const { return slots + slot * SLOT_BYTES; }

    // The wait ahead of this call has seen the last product with the piece before the current one end.
    __device__ __forceinline__ void release_previous(bool first) const {
        const u32 barrier = empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1);
#if MULTICAST > 1
        if (!first && threadIdx.x % 128 < MULTICAST) barrier_arrive_at(barrier, threadIdx.x % 128);
#else
        if (!first && threadIdx.x % 128 == 0) barrier_arrive(barrier);
#endif
    }
};

// Each lane asks for what some rows of this block read, so that it lies in the cache on the chip when a warp loads it.
__device__ __forceinline__ void prefetch_strip(const uint4* codes, int row_tile, int units, int first, int last, int bytes) {
    last = min(last, units);
    if (first < last) prefetch_bulk((const char*)codes + ((size_t)row_tile * units + first) * bytes, (last - first) * bytes);
}

__device__ __forceinline__ void prefetch_weights(const Arguments& a, int tile, int begin, int end, int lane) {
    const int row_tile = tile + lane;
    if (lane >= BLOCK_ROWS / 16 || row_tile >= a.row_tiles) return;
    const int per_step = SPARSE ? 1 : 2, last = min(end, a.steps);
    prefetch_strip(a.codes, row_tile, a.units, begin * per_step, last * per_step, 512);
#if SPARSE
    prefetch_strip((const uint4*)a.metadata, row_tile, a.units, begin, last, 256);
#endif
#if ADAPTERS
    prefetch_strip(a.left, row_tile, a.left_units, max(begin - a.steps, 0) * 2, (end - a.steps) * 2, 512);
#endif
}

// Pieces of L that a row reads.
__device__ __forceinline__ int steps_of(int2 ranks) { return (ranks.y + 1) / 2; }

__device__ __forceinline__ void bring_activations(const Arguments& a, Pipeline p, int begin, int end, int2 ranks, int tile, int token, int lane) {
    prefetch_weights(a, tile, begin, min(begin + STAGES + WINDOW, end), lane);
    if (lane == 0) {
        prefetch_map(&a.x_map);
        if (ADAPTERS) prefetch_map(&a.t_map);
    }
    if (a.wait_first) {
        wait_for_previous_launch();
        if (lane == 0) let_next_launch_begin();
    }
    const int mine = MULTICAST > 1 ? blockIdx.x % MULTICAST * (TOKENS / MULTICAST) : 0;  // tokens that this block brings
    auto bring = [&](const TensorMap* map, int step, int column) {
        if (step - begin >= STAGES) barrier_wait(p.empty + 8 * p.slot, p.parity ^ 1);
        if ((step - begin) % WINDOW == 0) {
            const int ahead = step + STAGES + WINDOW;
            prefetch_weights(a, tile, min(ahead, end), min(ahead + WINDOW, end), lane);
        }
        if (lane == 0) {
            const u32 barrier = p.full + 8 * p.slot;
            barrier_expect(barrier, SLOT_BYTES);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 to = p.data() + half * (SLOT_BYTES / 2) + mine * 128;
#if MULTICAST > 1
                load_box_everywhere(to, map, barrier, column + 64 * half, token + mine);
#else
                load_box(to, map, barrier, column + 64 * half, token);
#endif
            }
        }
        __syncwarp();
        p.advance();
    };
    for (int step = begin; step < min(end, a.steps); ++step) bring(&a.x_map, step, step * STEP);
#if ADAPTERS
    if (a.steps < end) wait_for_previous_launch();
    for (int step = max(begin, a.steps); step < min(end, a.steps + steps_of(ranks)); ++step)
        bring(&a.t_map, step, ranks.x + (step - a.steps) * STEP);
#endif
}

// Operands in registers must stay as they are until the products that read them are done: two sets take turns.
// A set holds the operands of several products, as many as registers allow: a step costs less the fewer sets it has.
#define BATCH (ROW_TILES == 2 ? 1 : SPARSE || ADAPTERS ? 2 : 4)  // of W
#define LEFT_BATCH (ROW_TILES == 2 && TOKENS == 128 ? 1 : 4)     // of L

__device__ __forceinline__ void multiply_weights(float (&sum)[ROW_TILES][SUMS], const Weights& w, Pipeline& p, u32 zero, bool first) {
    u32 of[2][BATCH][ROW_TILES][4];
#if SPARSE
    u32 metadata[2][BATCH][ROW_TILES];
#endif
#pragma unroll
    for (int batch = 0; batch < (SPARSE ? 4 : 8) / BATCH; ++batch) {
        const int set = batch & 1;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int j = batch * BATCH + i;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                decode_word(of[set][i][m], word_of(w.codes[m][j / 4], j % 4));
#if SPARSE
                // Straight from a load the assembler would let no two products overlap.
                metadata[set][i][m] = (j < 2 ? w.metadata[m].x : w.metadata[m].y) ^ zero;
#endif
#if GROUP > 0
                apply_scales(of[set][i][m], w.scales[m][j * (SPARSE ? 32 : 16) / GROUP]);
#endif
            }
        }
        if (batch == 0) barrier_wait(p.full + 8 * p.slot, p.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int j = batch * BATCH + i;
            const int offset = SPARSE ? (j / 2) * (SLOT_BYTES / 2) + (j % 2) * 64 : (j / 4) * (SLOT_BYTES / 2) + (j % 4) * 32;
            const u64 box = describe(p.data() + offset);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#if SPARSE
                if (j & 1) wgmma_sparse<1>(sum[m], of[set][i][m], box, metadata[set][i][m]);
                else wgmma_sparse<0>(sum[m], of[set][i][m], box, metadata[set][i][m]);
#else
                wgmma(sum[m], of[set][i][m], box);
#endif
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (batch == 0) p.release_previous(first);
    }
    p.advance();
}

__device__ __forceinline__ void multiply_left(float (&sum)[ROW_TILES][SUMS], const LeftWeights& w, Pipeline& p, bool first) {
    u32 of[2][LEFT_BATCH][ROW_TILES][4];
#pragma unroll
    for (int batch = 0; batch < 8 / LEFT_BATCH; ++batch) {
        const int set = batch & 1;
#pragma unroll
        for (int i = 0; i < LEFT_BATCH; ++i) {
            const int j = batch * LEFT_BATCH + i;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                decode_word(of[set][i][m], word_of(w.codes[m][j / 4], j % 4));
                apply_scales(of[set][i][m], w.scales[m][j / 4]);
            }
        }
        if (batch == 0) barrier_wait(p.full + 8 * p.slot, p.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < LEFT_BATCH; ++i) {
            const int j = batch * LEFT_BATCH + i;
            const u64 box = describe(p.data() + (j / 4) * (SLOT_BYTES / 2) + (j % 4) * 32);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) wgmma(sum[m], of[set][i][m], box);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (batch == 0) p.release_previous(first);
    }
    p.advance();
}

__device__ __forceinline__ void scale_rows(const Arguments& a, float (&sum)[ROW_TILES][SUMS], int tile, int lane) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const int row = (tile + 4 * m) * 16 + lane / 4;
        const float low = to_float(a.scale[a.row_scale && row < a.rows ? row : 0]);
        const float high = to_float(a.scale[a.row_scale && row + 8 < a.rows ? row + 8 : 0]);
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
            sum[m][i] *= low;
            sum[m][i + 1] *= low;
            sum[m][i + 2] *= high;
            sum[m][i + 3] *= high;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// Write what this block has summed of its tokens: 8 tokens of 64 rows at a time lie as fragments in `sums`.
struct Output {
    const Arguments& a;
    u32 staged;            // this warpgroup's room: TOKENS rows of 128 bytes, their 16 bytes in an order of their own
    unsigned char* from;

    __device__ __forceinline__ void stage(const float4& s, int row, int block, int warp, int lane) const {
        const float low = a.bias && row < a.rows ? to_float(a.bias[row]) : 0.f;
        const float high = a.bias && row + 8 < a.rows ? to_float(a.bias[row + 8]) : 0.f;
        const u32 first = from_float(s.x + low) | (u32)from_float(s.y + low) << 16;
        const u32 second = from_float(s.z + high) | (u32)from_float(s.w + high) << 16;
        const int token = lane & 7, piece = 2 * warp + ((lane >> 3) & 1);
        store_transposed(staged + (block * 8 + token) * 128 + ((piece ^ token) << 4), first, second);
    }

    __device__ __forceinline__ void write(int first_row, int first_token, int begin, int end) const {
        for (int i = threadIdx.x % 128 + begin * 64; i < end * 64; i += 128) {
            const int at = i / 8, piece = i % 8;
            const int token = first_token + at, row = first_row + 8 * piece;
            const uint4 v = *(const uint4*)(from + at * 128 + ((piece ^ (at & 7)) << 4));
            if (token >= a.tokens || row >= a.rows) continue;
            u16* const to = a.y + (size_t)token * a.rows + row;
            if (a.rows % 8 == 0) {
                *(uint4*)to = v;
            } else {
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (row + k < a.rows) to[k] = (u16)(words[k / 2] >> (16 * (k & 1)));
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) hopper_linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = blockIdx.x % CLUSTER, work = blockIdx.x / (CLUSTER * MULTICAST);
    const int block = work / a.token_tiles * MULTICAST + (MULTICAST > 1 ? blockIdx.x % MULTICAST : 0);
    const int block_tile = block * (BLOCK_ROWS / 16), token = work % a.token_tiles * TOKENS;
    const int total = a.steps + (a.left_units + 1) / 2;
    const int begin = total * share / CLUSTER, end = total * (share + 1) / CLUSTER;
    // All rows of a block read the same ranks. Blocks share the columns before they know how many: that takes a load.
    const int2 ranks = ADAPTERS ? a.rank_range[min(block_tile, a.row_tiles - 1)] : make_int2(0, 0);
    const u32 slots = (shared_address(shared) + 1023) & ~1023u;
    Pipeline pipeline{slots, shared_address(barriers), shared_address(barriers + STAGES), 0, 0};

    if (threadIdx.x == 0) {
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
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 4 * WARPGROUPS) bring_activations(a, pipeline, begin, end, ranks, block_tile, token, lane);
#if CLUSTER > 1
        cluster_sync();
#endif
#if CLUSTER > 1 || MULTICAST > 1
        cluster_sync();
#endif
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));

    const int group = warp / 4;
    const int tile = block_tile + group * 4 * ROW_TILES + warp % 4;
    const int middle = max(begin, min(end, a.steps));
    float sum[ROW_TILES][SUMS] = {};
    {
        Weights w[AHEAD + 1];
        const Source from = find_weights(a, tile, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load_weights(a, w[i], from, min(begin + i, a.steps - 1));
        for (int step = begin; step < middle; step += AHEAD + 1) {
#pragma unroll
            for (int i = 0; i <= AHEAD; ++i) {
                if (step + i < middle) {
                    load_weights(a, w[(i + AHEAD) % (AHEAD + 1)], from, min(step + i + AHEAD, a.steps - 1));
                    multiply_weights(sum, w[i], pipeline, a.zero, step + i == begin);
                }
            }
        }
    }
    wgmma_wait<0>();
#if GROUP == 0
    if (begin < middle) scale_rows(a, sum, tile, lane);
#endif
#if ADAPTERS
    {
        LeftWeights w[2];
        const int last = min(end, a.steps + steps_of(ranks));
        if (middle < last) load_left(a, w[0], tile, middle - a.steps, ranks.y, lane);
        for (int step = middle; step < last; step += 2) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (step + i < last) {
                    load_left(a, w[i ^ 1], tile, step + i + 1 - a.steps, ranks.y, lane);
                    multiply_left(sum, w[i], pipeline, step + i == begin);
                }
            }
        }
        wgmma_wait<0>();
    }
#endif
    if (!a.wait_first && threadIdx.x == 0) let_next_launch_begin();

    const u32 staged = slots + STAGES * SLOT_BYTES + group * TOKENS * 128;
    const Output output{a, staged, shared + (staged - shared_address(shared))};
#if CLUSTER > 1
    // Sums of all blocks of the cluster, as float4 [tile of 64 rows][8 tokens][thread], where activations were.
    const int thread = threadIdx.x;
    wait_named(1, 128 * WARPGROUPS);
    float4* const own = (float4*)(shared + (slots - shared_address(shared)));
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int b = 0; b < TOKENS / 8; ++b)
            own[(m * (TOKENS / 8) + b) * 128 * WARPGROUPS + thread] =
                make_float4(sum[m][4 * b], sum[m][4 * b + 1], sum[m][4 * b + 2], sum[m][4 * b + 3]);
    cluster_sync();
    const int pieces = ROW_TILES * (TOKENS / 8);
    const int from = pieces * share / CLUSTER, to = pieces * (share + 1) / CLUSTER;
    for (int m = from / (TOKENS / 8); m * (TOKENS / 8) < to; ++m) {
        const int first = max(from - m * (TOKENS / 8), 0), last = min(to - m * (TOKENS / 8), TOKENS / 8);
        for (int b = first; b < last; ++b) {
            float4 s = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int peer = 0; peer < CLUSTER; ++peer) {
                const float4 v = load_of_block(slots + ((m * (TOKENS / 8) + b) * 128 * WARPGROUPS + thread) * 16, peer);
                s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
            }
            output.stage(s, (tile + 4 * m) * 16 + lane / 4, b, warp % 4, lane);
        }
        wait_named(2 + group, 128);
        output.write((block_tile + (group * ROW_TILES + m) * 4) * 16, token, first, last);
        wait_named(2 + group, 128);
    }
    cluster_sync();
#else
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int b = 0; b < TOKENS / 8; ++b)
            output.stage(make_float4(sum[m][4 * b], sum[m][4 * b + 1], sum[m][4 * b + 2], sum[m][4 * b + 3]),
                         (tile + 4 * m) * 16 + lane / 4, b, warp % 4, lane);
        wait_named(2 + group, 128);
        output.write((block_tile + (group * ROW_TILES + m) * 4) * 16, token, 0, TOKENS / 8);
        wait_named(2 + group, 128);
    }
#if MULTICAST > 1
    // What others bring, and say, must find this block still there.
    cluster_sync();
#endif
#endif
}
