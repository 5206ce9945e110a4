// Packed tensors, as files and modules hold them, to a dense matrix of 16-bit numbers: weight = (code - zero) * scale,
// rounded once, and zero where nothing is stored. And the product of a few tokens with that matrix, which is then never
// written.
//
// A thread makes eight columns of a few rows: their codes are whole bytes in most forms, and their numbers 16 bytes that
// the threads of a warp write side by side.
//
// Compiled with -D:
//   BFLOAT16    1: scales and numbers are bfloat16; 0: float16
//   ARCH        compute capability, 80 or 90
//   BITS        of a code, 2 to 8; 0: values are numbers already
//   KEPT        0: all columns; 2: two of every four; 1: what the pattern says
//   SCALES      1: by row and group; 0: one for all
//   ASYMMETRIC  1: with a zero point for each scale; 0: it is 2^(BITS - 1)
//   LOAD_BYTES  codes are loaded by 1, 2 or 4 bytes; if more than 1, the codes of a thread are whole loads
//   TAIL        1: the last columns are fewer than eight
//   ROWS        of a thread
//   TOKENS      that a block of the product takes at once
//   SIGNS       1: with a binary part (signs.cuh)

#define THREADS 128
#define COLUMNS 8  // of a thread
#define VALUES (KEPT == 2 ? COLUMNS / 2 : COLUMNS)
#define PIECE_BITS (VALUES * BITS)
#define MISALIGNED (KEPT == 1 && BITS % 8 ? 7 : PIECE_BITS % 8)
#define PIECE_BYTES ((PIECE_BITS + MISALIGNED + 7) / 8)
#define EXPONENT 0x4b000000u  // of 2^23: its last mantissa bit is worth 1
#define PAIRS (BITS == 4 && KEPT != 1)  // codes become numbers two at a time

typedef unsigned char u8;
#if PIECE_BITS + MISALIGNED > 32
typedef u64 Codes;
#else
typedef u32 Codes;
#endif

struct Arguments {
    const u8* values;
    const u8* pattern;     // [rows][pattern bytes], a bit a column
    const u16* scale;      // [1] or [rows][groups]
    const u8* zero_point;  // the same
    const u32* kept_before;  // [rows][columns / 256]: values of the stream ahead of those columns, if KEPT is 1
    u16* dense;            // [rows][stride]
    u64 value_bytes;
    u32 row_bytes;         // of a row's stream, 0: all rows are one
    u32 stride;            // of `dense`
    int rows;
    int columns;
    int width;             // columns of `dense` that are written, a multiple of 8; zeros beyond `columns`
    int group;             // columns that share a scale, a multiple of 8
    int groups;
    int pattern_bytes;
    int segments;          // of 256 columns
    Signs signs;           // if SIGNS
};

struct Piece {
    Codes codes;
#if BITS == 0
    u16 numbers[VALUES];
#endif
    u32 mask;
    u16 scale;
    u32 zero;
};

__device__ __forceinline__ u64 product(u32 x, u32 y) { return (u64)x * y; }

// Codes from a byte and a bit on.
__device__ __forceinline__ Codes load_codes(const Arguments& a, u64 byte, u64 bit) {
    byte += bit / 8;
    const u8* from = a.values + byte;
    Codes codes = 0;
#if LOAD_BYTES == 4
#pragma unroll
    for (int i = 0; i < PIECE_BYTES / 4; ++i) codes |= (Codes)__ldg((const u32*)from + i) << (32 * i);
#elif LOAD_BYTES == 2
#pragma unroll
    for (int i = 0; i < PIECE_BYTES / 2; ++i) codes |= (Codes)__ldg((const u16*)from + i) << (16 * i);
#else
    const u64 left = a.value_bytes - min(byte, a.value_bytes);
#pragma unroll
    for (int i = 0; i < PIECE_BYTES; ++i) codes |= i < left ? (Codes)__ldg(from + i) << (8 * i) : 0;
#endif
    return MISALIGNED ? codes >> (bit % 8) : codes;
}

// The columns that are kept of a piece, none beyond the last.
__device__ __forceinline__ u32 load_mask(const Arguments& a, int row, int piece) {
#if KEPT
    return !TAIL || piece < a.pattern_bytes ? __ldg(a.pattern + product(row, a.pattern_bytes) + piece) : 0;
#else
    const int left = a.columns - COLUMNS * piece;
    return !TAIL || left >= COLUMNS ? 0xff : (1 << max(left, 0)) - 1;
#endif
}

// Values of the row's stream ahead of a piece; all lanes take part.
__device__ __forceinline__ u64 values_before(const Arguments& a, int row, int piece, u32 mask, int lane) {
#if KEPT == 1
    const int kept = __popc(mask);
    int sum = kept;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? other : 0;
    }
    const int segment = min(piece / 32, a.segments - 1);
    return (u64)__ldg(a.kept_before + product(row, a.segments) + segment) + sum - kept;
#else
    return (u64)piece * VALUES;
#endif
}

__device__ __forceinline__ void load_piece(const Arguments& a, Piece& p, int row, int piece, int group, int lane) {
    p.mask = load_mask(a, row, piece);
    const u64 before = values_before(a, row, piece, p.mask, lane);
#if BITS
    p.codes = !TAIL || p.mask ? load_codes(a, product(row, a.row_bytes), before * BITS) : 0;
    const u64 scale = SCALES ? product(row, a.groups) + group : 0;
    p.scale = __ldg(a.scale + scale);
    p.zero = ASYMMETRIC ? __ldg(a.zero_point + scale) : 1u << (BITS - 1);
#else
    const u16* from = (const u16*)(a.values + product(row, a.row_bytes)) + before;
    const int kept = KEPT == 1 ? __popc(p.mask) : 2 * ((p.mask & 15) != 0) + 2 * ((p.mask >> 4) != 0);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) p.numbers[i] = i < kept ? __ldg(from + i) : 0;
#endif
}

__device__ __forceinline__ u32 pack(u16 low, u16 high) { return low | (u32)high << 16; }

#if PAIRS
// Values 2 i and 2 i + 1 of the piece's stream: exact differences, whose products with the scale are rounded once.
__device__ __forceinline__ u32 number_pair(const Piece& p, int i) {
    const u32 four = p.codes >> (16 * (i / 2)) & 0xffff;
    const u32 apart = four | four << 12;  // the second code of a byte is 16 bits from the first
    const u32 minus_zero = (MAGIC | p.zero * 0x10001) ^ 0x80008000, scale = p.scale * 0x10001;
    u32 v;
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(v) : "r"(apart >> (8 * (i % 2))), "r"(MAGIC));
#if ARCH >= 90 || !BFLOAT16
    asm("add.rn." TYPE "x2 %0, %0, %1;" : "+r"(v) : "r"(minus_zero));
    asm("mul.rn." TYPE "x2 %0, %0, %1;" : "+r"(v) : "r"(scale));
#else
    asm("fma.rn." TYPE "x2 %0, %0, %1, %2;" : "+r"(v) : "r"(ONES), "r"(minus_zero));
    asm("fma.rn." TYPE "x2 %0, %0, %1, %2;" : "+r"(v) : "r"(scale), "r"(0x80008000));
#endif
    return v;
}
#endif

// Value `i` of the piece's stream.
__device__ __forceinline__ u16 number(const Piece& p, int i) {
#if BITS
    const u32 code = (u32)(p.codes >> (BITS * i)) & ((1u << BITS) - 1);
    return from_float((__uint_as_float(EXPONENT | code) - __uint_as_float(EXPONENT | p.zero)) * to_float(p.scale));
#else
    return p.numbers[i];
#endif
}

// Two columns of two values and zeros; the lower 16 bits of the selectors tell which.
__device__ __forceinline__ u32 place(u32 values, u32 selectors) {
    u32 columns;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(columns) : "r"(values), "r"(selectors));
    return columns;
}

// For each mask of four columns, how `place` makes them of the two values: columns 0 and 1 by the low half, 2 and 3 by the
// high one. Each lane knows one mask.
__device__ __forceinline__ u32 placement(int mask) {
    u32 selectors = 0;
    int kept = 0;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
        const bool keep = mask >> column & 1 && kept < 2;
        selectors |= (keep ? 0x10u + 0x22u * kept : 0x44u) << (8 * column);
        kept += keep;
    }
    return selectors;
}

__device__ __forceinline__ uint4 spread(const Piece& p, u32 placements) {
    u32 words[4];
#if KEPT == 2
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#if PAIRS
        const u32 values = number_pair(p, half);
#else
        const u32 values = pack(number(p, 2 * half), number(p, 2 * half + 1));
#endif
        const u32 selectors = __shfl_sync(~0u, placements, p.mask >> (4 * half) & 15);
        words[2 * half] = place(values, selectors);
        words[2 * half + 1] = place(values, selectors >> 16);
    }
#elif PAIRS && !TAIL
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = number_pair(p, i);
#else
    u16 numbers[COLUMNS];
#if KEPT == 1
    Piece rest = p;
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        const bool keep = p.mask >> column & 1;
        numbers[column] = keep ? number(rest, 0) : 0;
#if BITS
        rest.codes >>= keep ? BITS : 0;
#else
#pragma unroll
        for (int i = 0; i + 1 < VALUES; ++i) rest.numbers[i] = keep ? rest.numbers[i + 1] : rest.numbers[i];
#endif
    }
#else
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) numbers[column] = p.mask >> column & 1 ? number(p, column) : 0;
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack(numbers[2 * i], numbers[2 * i + 1]);
#endif
    return {words[0], words[1], words[2], words[3]};
}

extern "C" __global__ void __launch_bounds__(THREADS) unpack_weight(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32;
    int piece = blockIdx.x * THREADS + threadIdx.x;
    const bool writes = COLUMNS * piece < a.width, own = COLUMNS * piece < a.columns;
    u16* const to = a.dense + COLUMNS * piece;
    // All threads stay for the exchange between lanes; those without columns of their own load what is there.
    if (!TAIL && !own) piece = 0;
    const int group = a.groups > 1 ? min(COLUMNS * piece / a.group, a.groups - 1) : 0;
    const u32 placements = placement(lane & 15);
    for (int row = blockIdx.y * ROWS; row < a.rows; row += gridDim.y * ROWS) {
        Piece pieces[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) load_piece(a, pieces[i], min(row + i, a.rows - 1), piece, group, lane);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            uint4 numbers = spread(pieces[i], placements);
            if (writes && row + i < a.rows) {
#if SIGNS
                if (own) numbers = with_signs(a.signs, row + i, COLUMNS * piece, numbers);
#endif
                *(uint4*)(to + product(row + i, a.stride)) = own ? numbers : uint4{0, 0, 0, 0};
            }
        }
    }
}

struct ProductArguments {
    Arguments weight;
    const u16* x;     // [tokens][stride of x], rows at multiples of 16 bytes
    const u16* bias;  // [rows] or null
    u16* y;           // [tokens][stride of y]
    u32 x_stride;
    u32 y_stride;
    int tokens;
    int add;          // 1: to what is in y
};

#define WARPS (THREADS / 32)

// Warps share the columns of a block's rows, 256 at a time.
extern "C" __global__ void __launch_bounds__(THREADS) unpack_linear(const __grid_constant__ ProductArguments a) {
    __shared__ float shared[WARPS][ROWS * TOKENS];
    const Arguments& w = a.weight;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const u32 placements = placement(lane & 15);
    float sums[ROWS][TOKENS] = {};
    for (int first = 32 * warp; COLUMNS * first < w.columns; first += 32 * WARPS) {
        const int piece = first + lane;
        const bool own = COLUMNS * piece < w.columns;
        // All lanes take part in the exchanges; those without columns of their own load what is there.
        const int loaded = TAIL || own ? piece : 0;
        const int group = w.groups > 1 ? min(COLUMNS * loaded / w.group, w.groups - 1) : 0;
        Piece pieces[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) load_piece(w, pieces[i], min(first_row + i, w.rows - 1), loaded, group, lane);
        uint4 inputs[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const bool there = own && first_token + t < a.tokens;
            inputs[t] = there ? *(const uint4*)(a.x + (u64)(first_token + t) * a.x_stride + COLUMNS * piece) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            uint4 numbers = spread(pieces[i], placements);
#if SIGNS
            if (own) numbers = with_signs(w.signs, min(first_row + i, w.rows - 1), COLUMNS * piece, numbers);
#endif
            const u32 pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const u32 of[4] = {inputs[t].x, inputs[t].y, inputs[t].z, inputs[t].w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    sums[i][t] = fmaf(to_float((u16)pairs[k]), to_float((u16)of[k]), sums[i][t]);
                    sums[i][t] = fmaf(to_float((u16)(pairs[k] >> 16)), to_float((u16)(of[k] >> 16)), sums[i][t]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS * TOKENS; ++i) {
        float sum = sums[i / TOKENS][i % TOKENS];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) shared[warp][i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += THREADS) {
        const int row = first_row + i / TOKENS, token = first_token + i % TOKENS;
        if (row >= w.rows || token >= a.tokens) continue;
        u16* const y = a.y + (u64)token * a.y_stride + row;
        float sum = a.bias ? to_float(a.bias[row]) : 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) sum += shared[k][i];
        *y = from_float(a.add ? to_float(*y) + sum : sum);
    }
}
