// A linear layer whose groups of columns have codes of 1 to 8 bits, for up to 32 tokens; and its dense weight.
//
// Weights come in tiles of 16 rows. The codes of a tile are one stream: for 64 columns after the other (a unit) as many
// lines of 32 words as a code has bits, a word of each line for each lane of a warp. A lane's words hold the codes of two
// rows, 8 apart, and 16 columns, as the tensor cores' left operand has them. All lanes meet the same width, so none waits.
//
// The warps of a block share the columns of its rows, unit by unit in turn, and add their sums up in shared memory. Each
// has DEPTH units under way to a ring of its own in shared memory, so that memory is busy whatever a warp waits for, the
// first of them before the launch ahead has ended.
//
// Compiled with -D:
//   ASYMMETRIC   1: with a zero point for each scale; 0: it is 2^(width - 1). Signs (1 bit) have none.
//   WIDEST       lines that there is room for: bits of the widest codes, or 4
//   GROUP_UNITS  units that share scales
//   TILES        tiles of a block
//   TOKEN_TILES  tiles of 8 tokens, 1, 2 or 4
//   WARPS        of a block
//   DEPTH        units of a ring

#define UNIT 64
#define MOST_MEMBERS 8

typedef unsigned char u8;

// A layer, or one of several that read the same inputs: each has widths of its own.
struct Member {
    const u32* codes;  // [row tiles][lines][32]
    const u16* scale;  // [row tiles][groups][16]
    const u8* zero;    // the same
    const u32* units;  // [unit count]: sixteen times the first line, and the width
    int lines;
    int row_tiles;
    int rows;
    int first_row;     // of its rows among those of all
    int first_block;
};

struct Arguments {
    const u16* x;     // [tokens][columns]
    const u16* bias;  // [rows] or null
    u16* y;           // [tokens][rows], or the dense weight [rows][columns]
    Member members[MOST_MEMBERS];
    int member_count;
    int tokens;
    int rows;         // of all members
    int columns;
    int unit_count;
    int groups;
};

__device__ __forceinline__ const Member& member_of_block(const Arguments& a) {
    int found = 0;
    while (found + 1 < a.member_count && blockIdx.x >= a.members[found + 1].first_block) ++found;
    return a.members[found];
}

// A unit of a tile, as the copies of a warp put it: its lines, and scales and zeros of 16 rows.
struct __align__(16) Slot {
    u32 words[WIDEST][32];
    u16 scale[16];
    u8 zero[16];
};

// What a lane computes with: of rows lane / 4 and 8 below.
struct Unit {
    u32 words[WIDEST];
    u16 scale[2];
    u8 zero[2];
};

__device__ __forceinline__ void start_copy(
    const Arguments& a, const Member& m, Slot& slot, u32 place, int number, int tile, int lane) {
    const u64 here = min(tile, m.row_tiles - 1);
    const u64 group = here * a.groups + number / GROUP_UNITS;
    const u32* const from = m.codes + (here * m.lines + place / 16) * 32;
    // 16 bytes a lane: eight lanes a line.
#pragma unroll
    for (int piece = lane; piece < 8 * WIDEST; piece += 32) {
        if (piece < 8 * (place & 15)) copy_async(shared_address(slot.words) + 16 * piece, from + 4 * piece, 16);
    }
    if (lane < 2) copy_async(shared_address(&slot.scale[8 * lane]), m.scale + group * 16 + 8 * lane, 16);
    if (ASYMMETRIC && lane == 2) copy_async(shared_address(slot.zero), m.zero + group * 16, 16);
}

__device__ __forceinline__ Unit read_unit(const Slot& slot, int width, int lane) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < WIDEST; ++i) unit.words[i] = i < width ? slot.words[i][lane] : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        unit.scale[i] = slot.scale[lane / 4 + 8 * i];
        unit.zero[i] = ASYMMETRIC ? slot.zero[lane / 4 + 8 * i] : 1 << (width - 1);
    }
    return unit;
}

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 v;
#if ARCH >= 90 || !BFLOAT16
    asm("add.rn." TYPE "x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#else
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(v) : "r"(ONES), "r"(a), "r"(b));
#endif
    return v;
}

// MAGIC has room for seven bits of a code; an eighth is a number of its own.
template <int WIDTH>
struct Codes {
    static constexpr bool SPLIT = BFLOAT16 && WIDTH > 7;
    static constexpr u32 MASK = ((1u << (SPLIT ? 7 : WIDTH)) - 1) * 0x10001u;

    // Two numbers that are their codes less zero; codes lie in the low bits of both halves.
    static __device__ __forceinline__ u32 numbers(u32 codes, u32 minus_zero) {
        u32 v;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(codes), "r"(MASK), "r"(MAGIC));
        if (SPLIT) v = add_pairs(add_pairs(v, MAGIC ^ 0x80008000u), (codes >> 7 & 0x00010001u) * (MAGIC & 0xffff));
        return add_pairs(v, minus_zero);
    }

    static __device__ __forceinline__ u32 negated_zero(u8 zero) {
        const u32 both = zero * 0x10001u;
        return (SPLIT ? numbers(both, 0) : MAGIC | both) ^ 0x80008000u;
    }
};

// Pair `p` of 16: columns 4 (p / 4) and the next of the lane's 16, or for p % 4 above 1 the two after them; odd pairs are
// of the row 8 below.
template <int WIDTH>
__device__ __forceinline__ u32 pair(const u32 (&words)[WIDEST], int p, u32 minus_zero) {
    constexpr int A_WORD = 16 / WIDTH, LEFT_OVER = 16 % WIDTH;  // pairs, and bits of each half
    if (WIDTH == 1) return ((words[0] << (15 - p)) & 0x80008000u) ^ (ONES | 0x80008000u);
    if (p < A_WORD * WIDTH) return Codes<WIDTH>::numbers(words[p / A_WORD] >> (WIDTH * (p % A_WORD)), minus_zero);
    // The last pairs are what words have left over: bit b of a pair is in word b.
    const int place = 16 - LEFT_OVER + p - A_WORD * WIDTH;
    u32 spread = 0;
#pragma unroll
    for (int bit = 0; bit < WIDTH; ++bit) spread |= words[bit] >> (place - bit) & (0x00010001u << bit);
    return Codes<WIDTH>::numbers(spread, minus_zero);
}

template <int WIDTH>
__device__ __forceinline__ void multiply_unit(
    float (&sums)[TOKEN_TILES][4], const Unit& unit, const u32 (&x)[TOKEN_TILES][8]) {
    const u32 minus_zero[2] = {Codes<WIDTH>::negated_zero(unit.zero[0]), Codes<WIDTH>::negated_zero(unit.zero[1])};
    float products[TOKEN_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = pair<WIDTH>(unit.words, 4 * step + i, minus_zero[i % 2]);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) multiply(products[n], w, x[n][2 * step], x[n][2 * step + 1]);
    }
    const float scale[2] = {to_float(unit.scale[0]), to_float(unit.scale[1])};
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] += scale[i / 2] * products[n][i];
    }
}

// What a lane multiplies a unit by: 16 columns of a token, the same that its codes have.
__device__ __forceinline__ void load_inputs(const Arguments& a, u32 (&x)[TOKEN_TILES][8], int number, int lane) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        const int token = 8 * n + lane / 4;
        uint4 v[2] = {};
        if (token < a.tokens) {
            const uint4* from = (const uint4*)(a.x + (u64)token * a.columns + UNIT * number + 16 * (lane % 4));
            // Not by __ldg: what the launch ahead wrote must not come from a cache that was filled before.
            v[0] = from[0];
            v[1] = from[1];
        }
        x[n][0] = v[0].x, x[n][1] = v[0].y, x[n][2] = v[0].z, x[n][3] = v[0].w;
        x[n][4] = v[1].x, x[n][5] = v[1].y, x[n][6] = v[1].z, x[n][7] = v[1].w;
    }
}

union Shared {
    Slot ring[WARPS][DEPTH][TILES];
    // One number of padding a row: lanes that write have different banks.
    float sums[WARPS][16 * TILES][8 * TOKEN_TILES + 1];
};

extern "C" __global__ __launch_bounds__(32 * WARPS) void mixed_linear(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    const Member& m = member_of_block(a);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = (blockIdx.x - m.first_block) * TILES;
    Slot(&ring)[DEPTH][TILES] = shared.ring[warp];
    float sums[TILES][TOKEN_TILES][4] = {};
    u32 x[TOKEN_TILES][8], next_x[TOKEN_TILES][8];

#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const int number = warp + WARPS * i;
        if (number < a.unit_count) {
            const u32 place = __ldg(m.units + number);
#pragma unroll
            for (int t = 0; t < TILES; ++t) start_copy(a, m, ring[i][t], place, number, tile + t, lane);
        }
        copies_commit();
    }
    let_next_launch_begin();
    wait_for_previous_launch();
    if (warp < a.unit_count) load_inputs(a, next_x, warp, lane);

    int slot = 0;
    for (int number = warp; number < a.unit_count; number += WARPS) {
        const int ahead = number + WARPS * DEPTH;
        const u32 place_ahead = ahead < a.unit_count ? __ldg(m.units + ahead) : 0;
        const int width = __ldg(m.units + number) & 15;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[n][i] = next_x[n][i];
        }
        if (number + WARPS < a.unit_count) load_inputs(a, next_x, number + WARPS, lane);
        copies_wait<DEPTH - 1>();
        __syncwarp();
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const Unit unit = read_unit(ring[slot][t], width, lane);
            switch (width) {
                case 1: multiply_unit<1>(sums[t], unit, x); break;
                case 2: multiply_unit<2>(sums[t], unit, x); break;
                case 3: multiply_unit<3>(sums[t], unit, x); break;
#if WIDEST > 4
                case 5: multiply_unit<5>(sums[t], unit, x); break;
#endif
#if WIDEST > 5
                case 6: multiply_unit<6>(sums[t], unit, x); break;
#endif
#if WIDEST > 6
                case 7: multiply_unit<7>(sums[t], unit, x); break;
#endif
#if WIDEST > 7
                case 8: multiply_unit<8>(sums[t], unit, x); break;
#endif
                default: multiply_unit<4>(sums[t], unit, x);
            }
        }
        __syncwarp();
        if (ahead < a.unit_count) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) start_copy(a, m, ring[slot][t], place_ahead, ahead, tile + t, lane);
        }
        // Also without a copy, so that one group more is always one unit more.
        copies_commit();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    copies_wait<0>();
    __syncthreads();

#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                shared.sums[warp][16 * t + lane / 4 + 8 * (i / 2)][8 * n + 2 * (lane % 4) + i % 2] = sums[t][n][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * TILES * a.tokens; i += 32 * WARPS) {
        const int within = i % (16 * TILES), token = i / (16 * TILES), row = 16 * tile + within;
        if (row >= m.rows) continue;
        float sum = a.bias ? to_float(__ldg(a.bias + m.first_row + row)) : 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shared.sums[w][within][token];
        a.y[(u64)token * a.rows + m.first_row + row] = from_float(sum);
    }
}

template <int WIDTH>
__device__ __forceinline__ void expand_unit(const Arguments& a, const Unit& unit, int number, int tile, int lane) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const int row = 16 * tile + lane / 4 + 8 * below;
        const u32 minus_zero = Codes<WIDTH>::negated_zero(unit.zero[below]), scale = unit.scale[below] * 0x10001u;
        u32 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = pair<WIDTH>(unit.words, 2 * i + below, minus_zero);
#if ARCH >= 90 || !BFLOAT16
            asm("mul.rn." TYPE "x2 %0, %0, %1;" : "+r"(v[i]) : "r"(scale));
#else
            asm("fma.rn." TYPE "x2 %0, %0, %1, %2;" : "+r"(v[i]) : "r"(scale), "r"(0x80008000));
#endif
        }
        // Neighbours exchange halves, so that both write 16 columns of one at a time: whole sectors of memory.
        const bool odd = lane & 1;
        u32 mine[4], theirs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            mine[i] = odd ? v[4 + i] : v[i];
            theirs[i] = __shfl_xor_sync(~0u, odd ? v[i] : v[4 + i], 1);
        }
        if (row < a.rows) {
            uint4* to = (uint4*)(a.y + (u64)row * a.columns + UNIT * number + 16 * (lane % 4 & 2) + 8 * odd);
            const uint4 own = make_uint4(mine[0], mine[1], mine[2], mine[3]);
            const uint4 other = make_uint4(theirs[0], theirs[1], theirs[2], theirs[3]);
            to[0] = odd ? other : own;
            to[2] = odd ? own : other;
        }
    }
}

// The dense weight: a warp makes one unit of a tile after the other.
extern "C" __global__ __launch_bounds__(32 * WARPS) void mixed_expand(const __grid_constant__ Arguments a) {
    __shared__ Slot slots[WARPS];
    const Member& m = a.members[0];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * WARPS + warp;
    if (number >= a.unit_count) return;
    const u32 place = __ldg(m.units + number);
    for (int tile = blockIdx.y; tile < m.row_tiles; tile += gridDim.y) {
        start_copy(a, m, slots[warp], place, number, tile, lane);
        copies_commit();
        copies_wait<0>();
        __syncwarp();
        const Unit unit = read_unit(slots[warp], place & 15, lane);
        __syncwarp();
        switch (place & 15) {
            case 1: expand_unit<1>(a, unit, number, tile, lane); break;
            case 2: expand_unit<2>(a, unit, number, tile, lane); break;
            case 3: expand_unit<3>(a, unit, number, tile, lane); break;
#if WIDEST > 4
            case 5: expand_unit<5>(a, unit, number, tile, lane); break;
#endif
#if WIDEST > 5
            case 6: expand_unit<6>(a, unit, number, tile, lane); break;
#endif
#if WIDEST > 6
            case 7: expand_unit<7>(a, unit, number, tile, lane); break;
#endif
#if WIDEST > 7
            case 8: expand_unit<8>(a, unit, number, tile, lane); break;
#endif
            default: expand_unit<4>(a, unit, number, tile, lane);
        }
    }
}
