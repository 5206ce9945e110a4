// The binary part of a weight as it is stored: (left @ right) (.) B, with B = +1 and -1.
struct Signs {
    const unsigned char* signs;  // [rows][columns / 8, rounded up], a set bit is -1
    const u16* left;             // [rows][rank]
    const u16* right;            // [rank][columns]
    int rank;
    int columns;
};

// Eight numbers of a row, from `column`, a multiple of 8, on, with the binary part added: rounded once more. Numbers beyond
// the last column stay as they are.
__device__ __forceinline__ uint4 with_signs(const Signs& s, int row, int column, uint4 numbers) {
    const bool whole = s.columns % 8 == 0;
    float sum[8] = {};
    for (int k = 0; k < s.rank; ++k) {
        const float left = to_float(__ldg(s.left + (u64)row * s.rank + k));
        const u16* const from = s.right + (u64)k * s.columns + column;
        u32 pairs[4];
        if (whole) {
            const uint4 words = __ldg((const uint4*)from);
            pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 even = column + 2 * i < s.columns ? __ldg(from + 2 * i) : 0;
                const u32 odd = column + 2 * i + 1 < s.columns ? __ldg(from + 2 * i + 1) : 0;
                pairs[i] = even | odd << 16;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = fmaf(left, to_float((u16)(pairs[i / 2] >> (16 * (i % 2)))), sum[i]);
    }
    const u32 signs = __ldg(s.signs + (u64)row * ((s.columns + 7) / 8) + column / 8);
    u32 words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = signs >> (2 * i) & 1 ? -sum[2 * i] : sum[2 * i];
        const float odd = signs >> (2 * i + 1) & 1 ? -sum[2 * i + 1] : sum[2 * i + 1];
        words[i] = from_float(to_float((u16)words[i]) + even) | (u32)from_float(to_float((u16)(words[i] >> 16)) + odd) << 16;
    }
    return {words[0], words[1], words[2], words[3]};
}
