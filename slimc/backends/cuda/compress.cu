// The metadata of a 2:4 matrix in the order of cuSPARSELt's compressed form (as version 0.8 has it for 16-bit numbers).
//
// Four columns are a nibble: the two that are kept, two bits each. Blocks of 64 rows by 32 columns are 256 bytes,
// [row / 16 % 4][row % 8][group % 4][group / 4], of which the low nibble is a row and the high one the row 8 below; blocks
// lie side by side first. A thread makes eight bytes: 32 columns of two rows.

#define THREADS 256
#define WARPS (THREADS / 32)
#define CODES 0x444e4dc449844444ull  // for each mask of four columns the code of the two that it keeps, 4 bits each

typedef unsigned char u8;

struct Arguments {
    const u8* pattern;  // [rows][pattern bytes], a bit a column
    u64* metadata;
    int blocks;         // of 32 columns
};

// Eight nibbles: the codes of 32 columns.
__device__ __forceinline__ u32 codes(u32 masks) {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) found |= (u32)(CODES >> (4 * (masks >> (4 * i) & 15)) & 15) << (4 * i);
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS) write_metadata(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, block = blockIdx.x * WARPS + threadIdx.x / 32;
    const u32 row = 64 * blockIdx.y + lane / 8 * 16 + lane % 8;
    if (block >= a.blocks) return;
    const u32* masks = (const u32*)a.pattern + (u64)row * a.blocks + block;
    const u32 upper = codes(__ldg(masks)), lower = codes(__ldg(masks + 8 * a.blocks));
    u64 bytes = 0;
#pragma unroll
    for (int group = 0; group < 8; ++group) {
        const u64 both = (upper >> (4 * group) & 15) | (lower >> (4 * group) & 15) << 4;
        bytes |= both << (8 * (group % 4 * 2 + group / 4));
    }
    a.metadata[((u64)blockIdx.y * a.blocks + block) * 32 + lane] = bytes;
}
