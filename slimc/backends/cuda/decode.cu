// y = scale * (x @ W^T) + (x @ R^T) @ L^T + bias for few tokens, in one launch.
//
// W is 4-bit, dense or 2:4 sparse; R and L are dense 4-bit in groups of 64 columns. Weights are the left operand of the
// tensor cores (mma.sp / mma), 16 rows at a time, and lie in memory in the order of its registers, so that 16 bytes a
// lane are loaded straight from device memory and never pass shared memory. Tokens are the 8 columns of an instruction.
//
// Each block owns whole rows of W: its warps share the columns among themselves, and sum up in shared memory at the end.
// The product with R is a small matter that every block needs. It is cut into units, and a block that has nothing to
// wait for takes the next one (`ticket`), so that a unit is only ever waited for while some block computes it: no order of
// blocks, and no number of them that fits on the device, can make the launch hang. Sums are taken in a fixed order.
//
// Compiled with -D:
//   BFLOAT16      1: activations, scales and results are bfloat16; 0: float16
//   ARCH          compute capability, 80 or 90
//   SPARSE        1: W is 2:4; 0: W is dense
//   GROUP         columns of W that share a scale, 0: all of a row
//   ADAPTERS      1: with R and L
//   TOKEN_TILES   number of tokens / 8, rounded up
//   ROW_TILES     tiles of 16 rows that a warp holds at once
//   WARP_ROWS     warps side by side on different tiles
//   WARP_COLUMNS  warps that share the columns of a tile
//   STAGES        units of the weight in flight in each warp

#define WARPS (WARP_ROWS * WARP_COLUMNS)
#define THREADS (32 * WARPS)
#define PASS_TILES (ROW_TILES * WARP_ROWS)
#define UNIT (SPARSE ? 128 : 64)  // columns of W that a warp takes at a time: 16 bytes of codes a lane
#define TOKENS (8 * TOKEN_TILES)
#define PREFETCH_BYTES (128 << 10)
#define RIGHT_STAGES (TOKEN_TILES <= 2 ? 4 : 2)

#if GROUP > 0
#define GROUPS_IN_UNIT (GROUP < UNIT ? UNIT / GROUP : 1)
#endif

struct Arguments {
    const u16* x;          // [tokens, columns]
    u16* y;                // [tokens, rows]
    const uint4* codes;    // [row tiles][units][lane]
    const uint2* metadata; // [row tiles][units][lane], if SPARSE
    const u16* scale;      // [1], [rows]; with GROUP u32 [row tiles][groups][8]: rows g and g + 8
    const u16* bias;       // [rows] or null
    const uint4* right;    // [rank tiles][columns / 64][lane]
    const u32* right_scale;  // [rank tiles][columns / 64][8]
    const uint4* left;     // [row tiles][left units][lane]
    const u32* left_scale; // [row tiles][left units][8]
    float* partial;        // [splits][tokens][ranks]: x @ R^T over the columns of a split
    u32* counters;         // units begun, units done, blocks that left; all zero between launches
    const int2* rank_range; // [row tiles]: first rank that a tile's L reads, and how many units of 64
    int tokens;
    int rows;
    int columns;
    int row_tiles;
    int units;             // of a row tile: columns / UNIT, rounded up
    int groups;            // of a row, if GROUP
    int row_scale;         // 1: a scale a row, 0: one for all
    int ranks;             // of all adapters together, each padded to 64
    int rank_tiles;        // ranks / 16
    int left_units;        // units of 64 ranks that a row of L has room for
    int left_steps;        // units of L that each warp takes, a multiple of STAGES
    int splits;            // of a product with R, by columns
    int split_units;       // 64 columns each, of a split
    int chunk;             // columns of x in shared memory at a time
    int steps;             // units of a chunk that each warp takes, a multiple of STAGES
    int chunks;            // 1: all of x stays there
};

// --------------------------------------------------------------------------------------------------- activations

// Activations in shared memory: a row a token, 16 bytes longer than its columns, which keeps ldmatrix free of conflicts. With
// one tile of tokens only those that exist have a row; the others read 16 bytes of zeros, whatever the column.
#define STAGED_TOKENS(a) (TOKEN_TILES == 1 ? (a).tokens : TOKENS)

struct Activations {
    u32 base;     // of this lane's row and column
    u32 stride;   // bytes a token
    u32 columns;  // mask of the column's offset: none for zeros

    __device__ __forceinline__ void load(u32 (&b)[4], int token_tile, int column) const {
        const u32 offset = TOKEN_TILES == 1 ? (column * 2) & columns : token_tile * 8 * stride + column * 2;
        load_matrices(b, base + offset);
    }
};

__device__ __forceinline__ Activations activations(const Arguments& a, u32 base, u32 stride, u32 zeros, int lane) {
    const u32 row = base + (lane & 7) * stride + (lane >> 3) * 16;
    if (TOKEN_TILES > 1 || (lane & 7) < a.tokens) return {row, stride, ~0u};
    return {zeros, stride, 0};
}

// Copy `columns` columns, from `first` on, of rows of `width`; zeros where there are none.
__device__ __forceinline__ void stage(const u16* from, int tokens, int width, int rows, u32 to, u32 stride, int first, int columns) {
    const int pieces = columns / 8;
    for (int i = threadIdx.x; i < rows * pieces; i += THREADS) {
        const int token = i / pieces, column = 8 * (i - token * pieces);
        const bool inside = token < tokens && first + column < width;
        copy_async(to + token * stride + column * 2, from + (inside ? (size_t)token * width + first + column : 0), inside ? 16 : 0);
    }
}

__device__ __forceinline__ void stage_x(const Arguments& a, u32 to, u32 stride, int first, int columns) {
    stage(a.x, a.tokens, a.columns, STAGED_TOKENS(a), to, stride, first, columns);
    copies_commit();
}

// ------------------------------------------------------------------------------------------------------- products

// 16 rows by 32 columns of dense codes, without their scale: half of a unit.
__device__ __forceinline__ void multiply_dense_half(float (&c)[TOKEN_TILES][4], u32 first, u32 second, const Activations& x, int column) {
    u32 a0[4], a1[4];
    decode_word(a0, first);
    decode_word(a1, second);
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        u32 b[4];
        x.load(b, n, column);
        multiply(c[n], a0, b[0], b[1]);
        multiply(c[n], a1, b[2], b[3]);
    }
}

// 16 rows by 64 columns.
__device__ __forceinline__ void multiply_dense_unit(float (&c)[TOKEN_TILES][4], uint4 codes, const Activations& x, int column) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply_dense_half(c, words[2 * half], words[2 * half + 1], x, column + 32 * half);
}

// Add `c` times the scales of rows g (low half of `scales`) and g + 8 (high half).
__device__ __forceinline__ void add_scaled(float (&sum)[TOKEN_TILES][4], const float (&c)[TOKEN_TILES][4], u32 scales) {
    const float low = to_float((u16)(scales & 0xffff)), high = to_float((u16)(scales >> 16));
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        sum[n][0] += low * c[n][0];
        sum[n][1] += low * c[n][1];
        sum[n][2] += high * c[n][2];
        sum[n][3] += high * c[n][3];
    }
}

struct Weights {
    uint4 codes[ROW_TILES];
    uint2 metadata[ROW_TILES];  // of W; its first word is the scales of L
#if GROUP > 0
    u32 scales[ROW_TILES][GROUPS_IN_UNIT];
#endif
};

__device__ __forceinline__ void load_weights(const Arguments& a, Weights& w, int tile, int end, int unit, int lane) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        if (tile + i < end && unit < a.units) {
            const size_t at = ((size_t)(tile + i) * a.units + unit) * 32 + lane;
            w.codes[i] = load_once(a.codes + at);
#if SPARSE
            w.metadata[i] = load_once(a.metadata + at);
#endif
#if GROUP > 0
#pragma unroll
            for (int j = 0; j < GROUPS_IN_UNIT; ++j) {
                const int group = GROUP < UNIT ? unit * GROUPS_IN_UNIT + j : unit * UNIT / GROUP;
                const u32* scales = (const u32*)a.scale;
                w.scales[i][j] = group < a.groups ? load_once(scales + ((size_t)(tile + i) * a.groups + group) * 8 + lane / 4) : 0;
            }
#endif
        }
    }
}

#if ADAPTERS
__device__ __forceinline__ void load_left(const Arguments& a, Weights& w, int tile, int end, int unit, int lane) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        if (tile + i < end && unit < a.left_units) {
            const size_t at = (size_t)(tile + i) * a.left_units + unit;
            w.codes[i] = load_once(a.left + at * 32 + lane);
            w.metadata[i].x = load_once(a.left_scale + at * 8 + lane / 4);
        }
    }
}
#endif

// Multiply ROW_TILES tiles by UNIT columns; a fragment of x serves all of them.
__device__ __forceinline__ void multiply_weights(float (&sum)[ROW_TILES][TOKEN_TILES][4], const Weights& w,
                                                 const Activations& x, int column) {
#if SPARSE
#if GROUP > 0
    float part[ROW_TILES][TOKEN_TILES][4] = {};
#else
    float (&part)[ROW_TILES][TOKEN_TILES][4] = sum;
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            const uint4 codes = w.codes[i];
            decode_word(a[i], j == 0 ? codes.x : j == 1 ? codes.y : j == 2 ? codes.z : codes.w);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            u32 b[4];
            x.load(b, n, column + 32 * j);
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
                const u32 metadata = j < 2 ? w.metadata[i].x : w.metadata[i].y;
                if (j & 1) multiply_sparse<1>(part[i][n], a[i], b, metadata);
                else multiply_sparse<0>(part[i][n], a[i], b, metadata);
            }
        }
#if GROUP > 0
        if (j % (GROUP / 32) == GROUP / 32 - 1 || j == 3) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
                add_scaled(sum[i], part[i], w.scales[i][j * 32 / GROUP]);
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) part[i][n][0] = part[i][n][1] = part[i][n][2] = part[i][n][3] = 0;
            }
        }
#endif
    }
#else
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
#if GROUP == 32
        float first[TOKEN_TILES][4] = {}, second[TOKEN_TILES][4] = {};
        multiply_dense_half(first, w.codes[i].x, w.codes[i].y, x, column);
        multiply_dense_half(second, w.codes[i].z, w.codes[i].w, x, column + 32);
        add_scaled(sum[i], first, w.scales[i][0]);
        add_scaled(sum[i], second, w.scales[i][1]);
#elif GROUP > 0
        float part[TOKEN_TILES][4] = {};
        multiply_dense_unit(part, w.codes[i], x, column);
        add_scaled(sum[i], part, w.scales[i][0]);
#else
        multiply_dense_unit(sum[i], w.codes[i], x, column);
#endif
    }
#endif
}

// ---------------------------------------------------------------------------------------------------- reduction

// Sum what `sharers` warps hold of one tile and one group of 8 tokens; they lie `step` slots of 32 lanes apart.
__device__ __forceinline__ float4 sum_shared(const float4* slots, int sharers, int step, int lane) {
    float4 s = slots[lane];
    for (int i = 1; i < sharers; ++i) {
        const float4 v = slots[(size_t)i * step * 32 + lane];
        s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
    }
    return s;
}

// ------------------------------------------------------------------------------------------------ the small product

#if ADAPTERS
// Compute one unit of t = x @ R^T: 16 ranks over the columns of one split.
__device__ void multiply_right(const Arguments& a, int number, u32 x_shared, u32 x_stride, u32 zeros, float4* reduction, bool resident) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = number / a.splits, split = number % a.splits;
    const int total = (a.columns + 63) / 64;
    const int first = split * a.split_units, last = min(first + a.split_units, total);
    const uint4* const all_codes = a.right + (size_t)tile * total * 32 + lane;
    const u32* const all_scales = a.right_scale + (size_t)tile * total * 8 + lane / 4;
    const Activations x = activations(a, x_shared, x_stride, zeros, lane);
    float sum[TOKEN_TILES][4] = {};
    bool staged = resident;
    for (int start = first + warp; start < last || !staged; start += WARPS * RIGHT_STAGES) {
        uint4 codes[RIGHT_STAGES];
        u32 scales[RIGHT_STAGES];
#pragma unroll
        for (int s = 0; s < RIGHT_STAGES; ++s) {
            const int unit = start + s * WARPS;
            if (unit < last) {
                codes[s] = load_once(all_codes + (size_t)unit * 32);
                scales[s] = load_once(all_scales + (size_t)unit * 8);
            }
        }
        if (!staged) {
            __syncthreads();
            stage_x(a, x_shared, x_stride, first * 64, (last - first) * 64);
            copies_wait<0>();
            __syncthreads();
            staged = true;
        }
#pragma unroll
        for (int s = 0; s < RIGHT_STAGES; ++s) {
            const int unit = start + s * WARPS;
            if (unit < last) {
                float part[TOKEN_TILES][4] = {};
                multiply_dense_unit(part, codes[s], x, (resident ? unit : unit - first) * 64);
                add_scaled(sum, part, scales[s]);
            }
        }
    }
    for (int n = 0; n < TOKEN_TILES; ++n) {
        __syncthreads();
        reduction[warp * 32 + lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
        __syncthreads();
        if (warp == 0) {
            const float4 s = sum_shared(reduction, WARPS, 1, lane);
            const int token = n * 8 + 2 * (lane & 3);
            float* const out = a.partial + ((size_t)split * a.tokens + token) * a.ranks + tile * 16 + lane / 4;
            if (token < a.tokens) out[0] = s.x, out[8] = s.z;
            if (token + 1 < a.tokens) out[a.ranks] = s.y, out[a.ranks + 8] = s.w;
        }
    }
    if (warp == 0) {
        __threadfence();
        __syncwarp();
        if (lane == 0) atomicAdd(a.counters + 1, 1);
    }
}

// Bring t to shared memory: the sums of its splits, in their order, rounded once.
__device__ __forceinline__ void stage_t(const Arguments& a, unsigned char* to, u32 stride, int first, int columns) {
    const int pieces = columns / 4;
    for (int i = threadIdx.x; i < STAGED_TOKENS(a) * pieces; i += THREADS) {
        const int token = i / pieces, column = 4 * (i - token * pieces);
        float4 s = make_float4(0, 0, 0, 0);
        if (token < a.tokens) {
            const float4* from = (const float4*)(a.partial + (size_t)token * a.ranks + first + column);
            s = __ldcg(from);
            for (int split = 1; split < a.splits; ++split) {
                const float4 v = __ldcg(from + (size_t)split * a.tokens * (a.ranks / 4));
                s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
            }
        }
        const u32 low = from_float(s.x) | (u32)from_float(s.y) << 16, high = from_float(s.z) | (u32)from_float(s.w) << 16;
        *(uint2*)(to + token * stride + column * 2) = make_uint2(low, high);
    }
}

// Take the next unit that no block has begun; false if there is none.
__device__ bool take_unit(const Arguments& a, int* number) {
    __syncthreads();
    if (threadIdx.x == 0) *number = atomicAdd(a.counters, 1);
    __syncthreads();
    return *number < a.rank_tiles * a.splits;
}
#endif

// ------------------------------------------------------------------------------------------------------------ kernel

// Bring what this block reads first into the cache on the chip, beyond what fits in its registers.
__device__ __forceinline__ void prefetch_range(const void* from, size_t bytes) {
    for (size_t i = threadIdx.x * 128; i < bytes; i += THREADS * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + i));
}

__device__ __forceinline__ void prefetch(const Arguments& a, int begin, int end) {
    const size_t unit_count = (size_t)(end - begin) * a.units;
    if (unit_count * 512 > PREFETCH_BYTES) return;
    prefetch_range(a.codes + (size_t)begin * a.units * 32, unit_count * 512);
#if SPARSE
    prefetch_range(a.metadata + (size_t)begin * a.units * 32, unit_count * 256);
#endif
#if ADAPTERS
    prefetch_range(a.left + (size_t)begin * a.left_units * 32, (size_t)(end - begin) * a.left_units * 512);
    const size_t right = (size_t)a.rank_tiles * ((a.columns + 63) / 64) * 512;
    const size_t share = (right / gridDim.x + 127) / 128 * 128, first = share * blockIdx.x;
    if (first < right) prefetch_range((const char*)a.right + first, first + share < right ? share : right - first);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_linear(const Arguments a) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ int number;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / WARP_COLUMNS, warp_column = warp % WARP_COLUMNS;
    const bool resident = a.chunks == 1;

    // Rows of this block, in passes of PASS_TILES tiles.
    const int begin = (int)((long long)a.row_tiles * blockIdx.x / gridDim.x);
    const int end = (int)((long long)a.row_tiles * (blockIdx.x + 1) / gridDim.x);
    const int passes = (end - begin + PASS_TILES - 1) / PASS_TILES;
    const int weight_steps = a.steps * a.chunks;
    const int pass_steps = weight_steps + a.left_steps;

    // Weights do not depend on what ran before: they are under way while it still runs.
    Weights w[STAGES];
    int ahead_pass = 0, ahead_step = 0;
    auto fetch = [&](Weights& into) {
        if (ahead_pass < passes) {
            const int tile = begin + ahead_pass * PASS_TILES + warp_row * ROW_TILES;
            if (ahead_step < weight_steps) load_weights(a, into, tile, end, ahead_step * WARP_COLUMNS + warp_column, lane);
#if ADAPTERS
            else load_left(a, into, tile, end, (ahead_step - weight_steps) * WARP_COLUMNS + warp_column, lane);
#endif
            if (++ahead_step == pass_steps) ahead_step = 0, ++ahead_pass;
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) fetch(w[s]);
    prefetch(a, begin, min(end, begin + PASS_TILES));
    let_next_launch_begin();
    wait_for_previous_launch();

    // Shared memory: zeros, partial sums, x (two chunks, or all of it), t if all of it fits.
    const u32 x_stride = a.chunk * 2 + 16, x_bytes = x_stride * STAGED_TOKENS(a);
    const u32 zeros = shared_address(shared);
    float4* const reduction = (float4*)(shared + 16);
    const u32 x_shared = zeros + 16 + WARPS * ROW_TILES * 512;
    if (threadIdx.x == 0) *(uint4*)shared = make_uint4(0, 0, 0, 0);
    int turn = 0;  // which of the two chunks is read

    if (resident) stage_x(a, x_shared, x_stride, 0, a.chunk);
#if ADAPTERS
    // t follows x, or takes the place of both its chunks.
    const u32 t_stride = a.ranks * 2 + 16, t_offset = 16 + WARPS * ROW_TILES * 512 + (resident ? x_bytes : 0);
    const u32 t_shared = zeros + t_offset;
    unsigned char* const t_to = shared + t_offset;
    // With all of x at hand a block takes its share and comes back for what is left; otherwise it must finish first.
    const int units = a.rank_tiles * a.splits, share = resident ? (units + gridDim.x - 1) / gridDim.x : units;
    bool more = true, have_t = false;
    for (int i = 0; i < share && more; ++i) {
        more = take_unit(a, &number);
        if (i == 0) {
            copies_wait<0>();
            __syncthreads();
        }
        if (more) multiply_right(a, number, x_shared, x_stride, zeros, reduction, resident);
    }
    __syncthreads();
#endif
    if (!resident) stage_x(a, x_shared, x_stride, 0, a.chunk);

    for (int pass = 0; pass < passes; ++pass) {
        const int tile = begin + pass * PASS_TILES + warp_row * ROW_TILES;
        float sum[ROW_TILES][TOKEN_TILES][4] = {};
        for (int chunk = 0; chunk < a.chunks; ++chunk) {
            if (!resident || pass == 0) {
                copies_wait<0>();
                __syncthreads();
            }
            if (!resident && chunk + 1 < a.chunks) stage_x(a, x_shared + (turn ^ 1) * x_bytes, x_stride, (chunk + 1) * a.chunk, a.chunk);
            const Activations x = activations(a, x_shared + turn * x_bytes, x_stride, zeros, lane);
            if (!resident) turn ^= 1;
            for (int step = 0; step < a.steps; step += STAGES) {
#pragma unroll
                for (int s = 0; s < STAGES; ++s) {
                    const int unit = (step + s) * WARP_COLUMNS + warp_column;
                    if (chunk * (a.chunk / UNIT) + unit < a.units) multiply_weights(sum, w[s], x, unit * UNIT);
                    fetch(w[s]);
                }
            }
        }

#if GROUP == 0
        {
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
                const int row = (tile + i) * 16 + lane / 4;
                const float low = to_float(a.scale[a.row_scale && row < a.rows ? row : 0]);
                const float high = to_float(a.scale[a.row_scale && row + 8 < a.rows ? row + 8 : 0]);
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) {
                    sum[i][n][0] *= low;
                    sum[i][n][1] *= low;
                    sum[i][n][2] *= high;
                    sum[i][n][3] *= high;
                }
            }
        }
#endif

#if ADAPTERS
        if (!have_t) {
            // What nobody has begun is done here, so that waiting is only ever for blocks that run.
            if (resident)
                while (more && (more = take_unit(a, &number))) multiply_right(a, number, x_shared, x_stride, zeros, reduction, true);
            if (threadIdx.x == 0)
                while (load_acquire(a.counters + 1) < a.rank_tiles * a.splits) {}
            have_t = true;
            __syncthreads();
            if (resident) {
                stage_t(a, t_to, t_stride, 0, a.ranks);
                __syncthreads();
            }
        }
        if (!resident) {
            __syncthreads();
            stage_t(a, t_to, t_stride, 0, a.ranks);
            __syncthreads();
        }
        const Activations t = activations(a, t_shared, t_stride, zeros, lane);
        for (int step = 0; step < a.left_steps; step += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
                const int unit = (step + s) * WARP_COLUMNS + warp_column;
                if (unit < a.left_units) {
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        if (tile + i < end && unit < a.rank_range[tile + i].y) {
                            float part[TOKEN_TILES][4] = {};
                            multiply_dense_unit(part, w[s].codes[i], t, a.rank_range[tile + i].x + unit * 64);
                            add_scaled(sum[i], part, w[s].metadata[i].x);
                        }
                    }
                }
                fetch(w[s]);
            }
        }
#endif
        if (!resident && pass + 1 < passes) {
            __syncthreads();
            stage_x(a, x_shared + turn * x_bytes, x_stride, 0, a.chunk);
        }

        // Sum over the warps that share columns, 8 tokens at a time.
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i)
                reduction[((warp_column * WARP_ROWS + warp_row) * ROW_TILES + i) * 32 + lane] =
                    make_float4(sum[i][n][0], sum[i][n][1], sum[i][n][2], sum[i][n][3]);
            __syncthreads();
            for (int i = warp; i < PASS_TILES; i += WARPS) {
                const int row = (begin + pass * PASS_TILES + i) * 16 + lane / 4, token = n * 8 + 2 * (lane & 3);
                if (begin + pass * PASS_TILES + i < end) {
                    const float4 s = sum_shared(reduction + i * 32, WARP_COLUMNS, PASS_TILES, lane);
                    const float low = a.bias && row < a.rows ? to_float(a.bias[row]) : 0.f;
                    const float high = a.bias && row + 8 < a.rows ? to_float(a.bias[row + 8]) : 0.f;
                    if (row < a.rows && token < a.tokens) a.y[(size_t)token * a.rows + row] = from_float(s.x + low);
                    if (row < a.rows && token + 1 < a.tokens) a.y[(size_t)(token + 1) * a.rows + row] = from_float(s.y + low);
                    if (row + 8 < a.rows && token < a.tokens) a.y[(size_t)token * a.rows + row + 8] = from_float(s.z + high);
                    if (row + 8 < a.rows && token + 1 < a.tokens) a.y[(size_t)(token + 1) * a.rows + row + 8] = from_float(s.w + high);
                }
            }
        }
    }

#if ADAPTERS
    // The last block to leave puts the counters back; the others have all read them.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(a.counters + 2, 1) == gridDim.x - 1) a.counters[0] = a.counters[1] = a.counters[2] = 0;
#endif
}
