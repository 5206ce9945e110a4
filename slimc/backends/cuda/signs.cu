// The binary part of a layer: y += sum_k left[:, k] (.) (B (right[k] (.) x)), with B = +1 and -1, for a few tokens; and
// the matrix itself, (left @ right) (.) B, for dense products.
//
// A sign becomes the sign bit of a one: two by a shift and one logical operation. A lane reads 32 signs of a row, bits of
// one word, and the activations of the same 32 columns; the order of columns in a product of the tensor cores is free, so
// column i and column i + 16 of a word go together, whose bits are 16 apart as two 16-bit numbers are.
//
// A lane takes four words of a row one after another. The warps of a block share the columns of 16 * ROW_TILES rows and
// add up in shared memory. Signs are on their way before the launch ahead has ended, inputs are read after it.
//
// Compiled with -D:
//   BFLOAT16     1: activations, factors and results are bfloat16; 0: float16
//   ARCH         compute capability, 80 or 90
//   TOKEN_TILES  of 8 tokens, 1 or 2
//   ROW_TILES    of 16 rows, 1, 2 or 4

#define WARPS 8
#define MOST_MEMBERS 8
#define WORD_COLUMNS 32
#define LANE_WORDS 4
#define STEP_WORDS (4 * LANE_WORDS)  // of a row, that a warp takes at a time
#define TOKENS (8 * TOKEN_TILES)
#define ROWS (16 * ROW_TILES)
#define SIGN_BITS 0x80008000u

// The signs of a layer, or of one of several that read the same inputs.
struct Member {
    const u32* signs;  // [rows][columns / 32], a set bit is -1
    const u16* left;   // [rows][rank]
    const u16* right;  // [rank][columns]
    int rank;
    int rows;
    int first_row;     // of its rows among those of all
    int first_block;
};

struct Arguments {
    const u16* x;  // [tokens][columns]
    u16* y;        // [tokens][rows]
    Member members[MOST_MEMBERS];
    int member_count;
    int rows;      // of all members
    int columns;   // a multiple of 32
    int tokens;
};

// Two ones with the signs of bits `first` and `first + 16`.
__device__ __forceinline__ u32 signed_ones(u32 signs, int first) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(signs << (15 - first)), "r"(SIGN_BITS), "r"(ONES));
    return v;
}

// Products rounded to 16 bits, as the input of B is defined. (An fma that adds -0: there is no other before Hopper.)
__device__ __forceinline__ u32 product_pair(u32 a, u32 b) {
    u32 v;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(SIGN_BITS));
    return v;
}

// Columns i and i + 16 of 32: of pairs of neighbours, the low halves or the high ones.
template <int HALF>
__device__ __forceinline__ u32 together(u32 near, u32 far) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(near), "r"(far), "n"(HALF ? 0x7632 : 0x5410));
    return v;
}

// The 32 inputs of B that a token has in a word's columns; zeros where there is no token or no column.
__device__ __forceinline__ void load_inputs(
    u32 (&inputs)[16], const Arguments& a, const Member& m, int token, int word, int k) {
    const bool valid = token < a.tokens && word * WORD_COLUMNS < a.columns;
    // Not by __ldg: what the launch ahead wrote must not come from a cache that was filled before.
    const uint4* x = (const uint4*)(a.x + (u64)token * a.columns + word * WORD_COLUMNS);
    const uint4* right = (const uint4*)(m.right + (u64)k * a.columns + word * WORD_COLUMNS);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 values = valid ? x[i] : uint4{0, 0, 0, 0};
        const uint4 factors = valid ? __ldg(right + i) : uint4{0, 0, 0, 0};
        inputs[4 * i] = product_pair(values.x, factors.x);
        inputs[4 * i + 1] = product_pair(values.y, factors.y);
        inputs[4 * i + 2] = product_pair(values.z, factors.z);
        inputs[4 * i + 3] = product_pair(values.w, factors.w);
    }
}

// The signs of a lane: LANE_WORDS words, from `word` on, of a row of each eight; zeros where there are none.
__device__ __forceinline__ void load_signs(
    u32 (&signs)[ROW_TILES][2][LANE_WORDS], const Arguments& a, const Member& m, int first_row, int word) {
    const int words = a.columns / WORD_COLUMNS;
#pragma unroll
    for (int r = 0; r < 2 * ROW_TILES; ++r) {
        u32(&found)[LANE_WORDS] = signs[r / 2][r % 2];
        const int row = first_row + 8 * r;
        const u32* const from = m.signs + (u64)row * words + word;
        if (words % LANE_WORDS == 0) {
            const bool valid = row < m.rows && word < words;
            const uint4 four = valid ? load_once((const uint4*)from) : uint4{0, 0, 0, 0};
            found[0] = four.x, found[1] = four.y, found[2] = four.z, found[3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < LANE_WORDS; ++i) {
                found[i] = row < m.rows && word + i < words ? load_once(from + i) : 0;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) add_signs(const __grid_constant__ Arguments a) {
    __shared__ float sums[WARPS][TOKENS][ROWS + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    int member = 0;
    while (member + 1 < a.member_count && blockIdx.x >= a.members[member + 1].first_block) ++member;
    const Member& m = a.members[member];
    const int first_row = (blockIdx.x - m.first_block) * ROWS, first_token = blockIdx.y * TOKENS;
    const int steps = (a.columns / WORD_COLUMNS + STEP_WORDS - 1) / STEP_WORDS;

    u32 ahead[ROW_TILES][2][LANE_WORDS];
    load_signs(ahead, a, m, first_row + g, STEP_WORDS * warp + LANE_WORDS * t);
    let_next_launch_begin();
    wait_for_previous_launch();

    float totals[ROW_TILES][TOKEN_TILES][4] = {};
    for (int k = 0; k < m.rank; ++k) {
        float sum[ROW_TILES][TOKEN_TILES][4] = {};
        for (int step = warp; step < steps; step += WARPS) {
            u32 signs[ROW_TILES][2][LANE_WORDS];
#pragma unroll
            for (int i = 0; i < ROW_TILES * 2 * LANE_WORDS; ++i) (&signs[0][0][0])[i] = (&ahead[0][0][0])[i];
            // Those of the next rank are the first ones again.
            const int next = step + WARPS < steps ? step + WARPS : warp;
            if (next != warp || k + 1 < m.rank) load_signs(ahead, a, m, first_row + g, STEP_WORDS * next + LANE_WORDS * t);
#pragma unroll
            for (int i = 0; i < LANE_WORDS; ++i) {
                const int word = STEP_WORDS * step + LANE_WORDS * t + i;
                u32 inputs[TOKEN_TILES][16];
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) load_inputs(inputs[n], a, m, first_token + 8 * n + g, word, k);
#pragma unroll
                for (int part = 0; part < 8; ++part) {
                    u32 b[TOKEN_TILES][2];
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) {
                        b[n][0] = together<0>(inputs[n][part], inputs[n][part + 8]);
                        b[n][1] = together<1>(inputs[n][part], inputs[n][part + 8]);
                    }
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r) {
                        const u32 upper = signs[r][0][i], lower = signs[r][1][i];
                        const u32 ones[4] = {
                            signed_ones(upper, 2 * part), signed_ones(lower, 2 * part),
                            signed_ones(upper, 2 * part + 1), signed_ones(lower, 2 * part + 1)};
#pragma unroll
                        for (int n = 0; n < TOKEN_TILES; ++n) multiply(sum[r][n], ones, b[n][0], b[n][1]);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * r + 8 * half + g;
                const float factor = row < m.rows ? to_float(__ldg(m.left + (u64)row * m.rank + k)) : 0;
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) {
                    totals[r][n][2 * half] += factor * sum[r][n][2 * half];
                    totals[r][n][2 * half + 1] += factor * sum[r][n][2 * half + 1];
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][8 * n + 2 * t + i % 2][16 * r + 8 * (i / 2) + g] = totals[r][n][i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += 32 * WARPS) {
        const int token = i / ROWS, row = i % ROWS;
        if (first_token + token >= a.tokens || first_row + row >= m.rows) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][token][row];
        u16* const y = a.y + (u64)(first_token + token) * a.rows + m.first_row + first_row + row;
        *y = from_float(to_float(*y) + sum);
    }
}

struct MatrixArguments {
    Signs signs;
    u16* matrix;  // [rows][columns]
    int rows;
};

#define MATRIX_THREADS 128

extern "C" __global__ void __launch_bounds__(MATRIX_THREADS) write_signs(const __grid_constant__ MatrixArguments a) {
    const int column = 8 * (blockIdx.x * MATRIX_THREADS + threadIdx.x), columns = a.signs.columns;
    if (column >= columns) return;
    for (int row = blockIdx.y; row < a.rows; row += gridDim.y) {
        u16* const to = a.matrix + (u64)row * columns + column;
        const uint4 numbers = with_signs(a.signs, row, column, uint4{0, 0, 0, 0});
        if (columns % 8 == 0) {
            *(uint4*)to = numbers;
        } else {
            const u32 pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (column + i < columns) to[i] = (u16)(pairs[i / 2] >> (16 * (i % 2)));
        }
    }
}
