// Fragments, the order in which kernels multiply (fragments.py), to matrices of 16-bit numbers: of 4-bit codes code - 8,
// times the scale, rounded once; of values these.
//
// A warp takes 16 rows by 64 codes or values a row. Its lanes hold two numbers of every eight; they exchange them so that each
// writes 16 bytes at a time.
//
// Compiled with -D:
//   BFLOAT16  1: scales and numbers are bfloat16; 0: float16
//   ARCH      compute capability, 80 or 90
//   PLACE     1: two codes become four columns, two of them zeros, as the metadata says; 0: a code is a column
//   UNIT      columns of the weight in 64 codes: 128 if it is 2:4, else 64
//   GROUP     columns of the weight that share a scale, 0: all of a row
//   VALUES    1: 16-bit values; 0: 4-bit codes
//   SIGNS     1: with a binary part (signs.cuh)

#define THREADS 256
#define WARPS (THREADS / 32)
#define WRITTEN (PLACE ? 128 : 64)  // columns that a warp writes of a row

struct Arguments {
    const uint4* codes;     // [row tiles][units][lane], of values [row tiles][units][4][lane]
    const uint2* metadata;  // [row tiles][units][lane], if PLACE
    const u16* scale;       // [1], [rows]; with GROUP u32 [row tiles][groups][8]: rows g and g + 8
    u16* dense;             // [rows][stride]
    u32 stride;
    int rows;
    int columns;            // that are written, a multiple of 8
    int row_tiles;
    int units;              // of a row tile
    int groups;             // of a row, if GROUP
    int row_scale;          // 1: a scale a row, 0: one for all
#if SIGNS
    Signs signs;
#endif
};

__device__ __forceinline__ u32 scaled(u32 pair, u32 scale) {
    u32 product;
#if ARCH >= 90 || !BFLOAT16
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(scale));
#else
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(product) : "r"(pair), "r"(scale), "r"(0x80008000));
#endif
    return product;
}

// The scales of rows g and g + 8, each twice in a word, for codes from `instruction` * 16 on.
__device__ __forceinline__ void load_scales(const Arguments& a, u32 (&scales)[2], int tile, int unit, int instruction, int g) {
#if GROUP
    const int group = min((unit * UNIT + instruction * (UNIT / 4)) / GROUP, a.groups - 1);
    const u32 both = __ldg((const u32*)a.scale + ((u64)tile * a.groups + group) * 8 + g);
    scales[0] = (both & 0xffff) * 0x10001;
    scales[1] = (both >> 16) * 0x10001;
#else
#pragma unroll
    for (int half = 0; half < 2; ++half)
        scales[half] = __ldg(a.scale + (a.row_scale ? min(16 * tile + 8 * half + g, a.rows - 1) : 0)) * 0x10001;
#endif
}

// Lane t of four holds word t of four vectors; afterwards it holds vector t.
__device__ __forceinline__ void transpose(u32 (&words)[4], int t) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int low = step == 1 ? 2 * k : k, high = low + step;
            const u32 received = __shfl_xor_sync(~0u, t & step ? words[low] : words[high], step);
            if (t & step) words[low] = received;
            else words[high] = received;
        }
    }
}

// Four columns of the two kept in them: `code` has their places, two bits each.
__device__ __forceinline__ uint2 place(u32 pair, u32 code) {
    const u32 selectors = 0x44444444u ^ 0x54u << (8 * (code & 3)) ^ 0x76u << (8 * (code >> 2 & 3));
    uint2 columns;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(columns.x) : "r"(pair), "r"(selectors));
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(columns.y) : "r"(pair), "r"(selectors >> 16));
    return columns;
}

__device__ __forceinline__ void store(const Arguments& a, int row, int column, uint4 numbers) {
    if (row >= a.rows || column >= a.columns) return;
#if SIGNS
    numbers = with_signs(a.signs, row, column, numbers);
#endif
    *(uint4*)(a.dense + (u64)row * a.stride + column) = numbers;
}

extern "C" __global__ void __launch_bounds__(THREADS) expand_fragments(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 units = (u64)a.row_tiles * a.units;
    for (u64 at = (u64)blockIdx.x * WARPS + threadIdx.x / 32; at < units; at += (u64)gridDim.x * WARPS) {
        const int tile = at / a.units, unit = at % a.units;
#if !VALUES
        const uint4 codes = load_once(a.codes + at * 32 + lane);
        const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#endif
        u32 numbers[2][8];  // rows g and g + 8; numbers 2 t and 2 t + 1 of every eight
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#if VALUES
            const uint4 values = load_once(a.codes + (at * 4 + i) * 32 + lane);
            numbers[0][2 * i] = values.x, numbers[1][2 * i] = values.y;
            numbers[0][2 * i + 1] = values.z, numbers[1][2 * i + 1] = values.w;
#else
            u32 scales[2];
            load_scales(a, scales, tile, unit, i, g);
#pragma unroll
            for (int r = 0; r < 4; ++r) numbers[r % 2][2 * i + r / 2] = scaled(decode_pair(words[i] >> (4 * r)), scales[r % 2]);
#endif
        }
        const int column = unit * WRITTEN;
#if PLACE
        const uint2 metadata = load_once(a.metadata + at * 32 + lane);
        uint2 four[2][8];
#pragma unroll
        for (int piece = 0; piece < 8; ++piece) {
            const u32 places = __shfl_sync(~0u, piece < 4 ? metadata.x : metadata.y, piece % 4, 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) four[half][piece] = place(numbers[half][piece], places >> (16 * half + 4 * t));
        }
        const bool odd = t & 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int piece = 0; piece < 8; piece += 2) {
                const uint2 sent = odd ? four[half][piece] : four[half][piece + 1], own = odd ? four[half][piece + 1] : four[half][piece];
                const uint2 received = {__shfl_xor_sync(~0u, sent.x, 1), __shfl_xor_sync(~0u, sent.y, 1)};
                const uint4 vector = odd ? uint4{received.x, received.y, own.x, own.y} : uint4{own.x, own.y, received.x, received.y};
                store(a, 16 * tile + 8 * half + g, column + 16 * (piece + odd) + 8 * (t / 2), vector);
            }
        }
#else
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int first = 0; first < 8; first += 4) {
                u32 vector[4] = {numbers[half][first], numbers[half][first + 1], numbers[half][first + 2], numbers[half][first + 3]};
                transpose(vector, t);
                store(a, 16 * tile + 8 * half + g, column + 8 * (first + t), {vector[0], vector[1], vector[2], vector[3]});
            }
        }
#endif
    }
}

// The metadata in the order of cuSPARSELt: blocks of 64 rows by 32 columns are 256 bytes, [row / 16 % 4][row % 8][group % 4]
// [group / 4], of which the low nibble is a row and the high one the row 8 below; blocks lie side by side first. A thread
// makes eight bytes: 32 columns of two rows.
struct MetadataArguments {
    const u32* metadata;  // [row tiles][units][lane][2]
    u64* ordered;
    int row_tiles;        // a multiple of 4
    int units;
    int blocks;           // of 32 columns
};

extern "C" __global__ void __launch_bounds__(THREADS) order_metadata(const __grid_constant__ MetadataArguments a) {
    const int g = threadIdx.x % 8, block = blockIdx.x * (THREADS / 8) + threadIdx.x / 8, tile = blockIdx.y;
    if (block >= a.blocks) return;
    const int instruction = block % 4;
    const u32* words = a.metadata + (((u64)tile * a.units + block / 4) * 32 + 4 * g + instruction % 2 * 2) * 2 + instruction / 2;
    u64 bytes = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 places = __ldg(words + 2 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u64 both = (places >> (4 * i) & 15) | (places >> (16 + 4 * i) & 15) << 4;
            bytes |= both << (8 * (2 * i + half));
        }
    }
    a.ordered[((u64)(tile / 4) * a.blocks + block) * 32 + tile % 4 * 8 + g] = bytes;
}
