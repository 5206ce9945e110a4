// The binary part of a weight as it is stored: (left @ right) (.) B, with B = +1 and -1.
struct Signs {
    const unsigned char* signs;  // [rows][columns / 8, rounded up], a set bit is -1
    const u16* left;             // [rows][rank]
    const u16* right;            // [rank][columns]
    int rank;
    int columns;
};

__device__ __forceinline__ u32 add_product(u32 a, u32 b, u32 sum) {
    asm("fma.rn." TYPE "x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

// Eight numbers of a row, from `column`, a multiple of 8, on, with the binary part added: rounded once more for each of its
// ranks. Numbers beyond the last column stay as they are.
__device__ __forceinline__ uint4 with_signs(const Signs& s, int row, int column, uint4 numbers) {
    const u32 signs = __ldg(s.signs + (u64)row * ((s.columns + 7) / 8) + column / 8);
    u32 words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
    for (int k = 0; k < s.rank; ++k) {
        const u32 left = __ldg(s.left + (u64)row * s.rank + k) * 0x10001u;
        const u16* const from = s.right + (u64)k * s.columns + column;
        u32 right[4];
        if (s.columns % 8 == 0) {
            const uint4 eight = __ldg((const uint4*)from);
            right[0] = eight.x, right[1] = eight.y, right[2] = eight.z, right[3] = eight.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 even = column + 2 * i < s.columns ? __ldg(from + 2 * i) : 0;
                const u32 odd = column + 2 * i + 1 < s.columns ? __ldg(from + 2 * i + 1) : 0;
                right[i] = even | odd << 16;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 negative = (signs << (15 - 2 * i) & 0x8000u) | (signs << (30 - 2 * i) & 0x80000000u);
            words[i] = add_product(left, right[i] ^ negative, words[i]);
        }
    }
    return {words[0], words[1], words[2], words[3]};
}
