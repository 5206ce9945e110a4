// Attention of a few queries over a cache of keys and values: y = softmax(scale * q @ k^T, where the mask allows) @ v.
//
// A block takes a run of keys of one head of one sequence; its warps take turns at pieces of 16 keys, all of whose keys
// and values are on their way at once. A piece that the mask hides from all queries is not read, so that what is not
// filled yet of a cache costs nothing. Blocks leave what they have found, and the last of a head puts it together.
//
// Compiled with -D, besides those of common.cuh:
//   HEAD   numbers of a query, a key or a value: 64 or 128
//   ROWS   queries of a head, which read the same keys
//   MASK   1: bytes say which keys a query may see; 0: it sees all

#define INFINITY __int_as_float(0x7f800000)
#define WARPS 4
#define PIECE 16                  // keys that a warp takes at a time
#define LANES (HEAD / 8)          // that hold a key, 8 numbers each
#define AT_ONCE (32 / LANES)      // keys that a warp holds side by side
#define STEPS (PIECE / AT_ONCE)
#define FOUND (HEAD + 2)          // what a block leaves for a query: the largest score, the sum of weights, of values

struct Arguments {
    const u16* q;   // [batch][heads][ROWS][HEAD], at strides
    const u16* k;   // [batch][heads][keys][HEAD], at strides
    const u16* v;
    const unsigned char* mask;  // [batch][heads][ROWS][keys], at strides, which may be 0; if MASK
    u16* y;         // [batch][ROWS][heads][HEAD]
    float* found;   // [batch * heads][runs][ROWS][FOUND]
    u32* arrived;   // [batch * heads] zeros, and zeros again afterwards
    long long q_strides[3], k_strides[3], v_strides[3], mask_strides[4];
    float scale;    // times log2(e)
    int heads;
    int keys;
    int run;        // keys of a block, a multiple of WARPS * PIECE
};

struct Sums {
    float largest, weights, values[8];

    // Makes room for a larger score; what was summed is worth less beside it.
    __device__ __forceinline__ void rescale(float to) {
        const float factor = largest == to ? 1.f : exp2f(largest - to);
        weights *= factor;
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= factor;
        largest = to;
    }
};

__device__ __forceinline__ void unpack(float (&f)[8], const uint4& words) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) f[2 * i] = to_float((u16)w[i]), f[2 * i + 1] = to_float((u16)(w[i] >> 16));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(const __grid_constant__ Arguments a) {
    __shared__ float shared[WARPS][ROWS][FOUND];
    __shared__ bool last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, side = lane / LANES;
    const int batch = blockIdx.y / a.heads, head = blockIdx.y % a.heads;
    const u16* const k = a.k + batch * a.k_strides[0] + head * a.k_strides[1] + 8 * part;
    const u16* const v = a.v + batch * a.v_strides[0] + head * a.v_strides[1] + 8 * part;
    const unsigned char* const mask = MASK ? a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1] : 0;
    const int begin = blockIdx.x * a.run, end = min(begin + a.run, a.keys);

    wait_for_previous_launch();
    let_next_launch_begin();
    float q[ROWS][8];
    Sums sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u16* const from = a.q + batch * a.q_strides[0] + head * a.q_strides[1] + r * a.q_strides[2] + 8 * part;
        unpack(q[r], *(const uint4*)from);
        sums[r] = {-INFINITY, 0.f, {}};
    }
    for (int first = begin + warp * PIECE; first < end; first += WARPS * PIECE) {
        // A lane knows of one key which queries see it.
        u32 seen = 0;
        const int own = first + lane;
        if (lane < PIECE && own < end) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (!MASK || mask[r * a.mask_strides[2] + own * a.mask_strides[3]]) seen |= 1u << r;
        }
        if (!__any_sync(~0u, seen)) continue;
        uint4 keys[STEPS], values[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const long long key = min(first + i * AT_ONCE + side, a.keys - 1);
            keys[i] = load_once((const uint4*)(k + key * a.k_strides[2]));
            values[i] = load_once((const uint4*)(v + key * a.v_strides[2]));
        }
        float scores[ROWS][STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            float key[8];
            unpack(key, keys[i]);
            const u32 visible = __shfl_sync(~0u, seen, i * AT_ONCE + side);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float score = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) score = fmaf(q[r][j], key[j], score);
#pragma unroll
                for (int other = LANES / 2; other; other /= 2) score += __shfl_xor_sync(~0u, score, other);
                scores[r][i] = visible >> r & 1 ? score * a.scale : -INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float largest = sums[r].largest;
#pragma unroll
            for (int i = 0; i < STEPS; ++i) largest = fmaxf(largest, scores[r][i]);
            if (largest == -INFINITY) continue;
            sums[r].rescale(largest);
#pragma unroll
            for (int i = 0; i < STEPS; ++i) sums[r].weights += scores[r][i] = exp2f(scores[r][i] - largest);
        }
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            float value[8];
            unpack(value, values[i]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (sums[r].largest != -INFINITY) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[r].values[j] = fmaf(scores[r][i], value[j], sums[r].values[j]);
                }
        }
    }

    // The keys that a warp holds side by side.
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Sums& own = sums[r];
#pragma unroll
        for (int other = LANES; other < 32; other *= 2) {
            const float theirs = __shfl_xor_sync(~0u, own.largest, other), both = fmaxf(own.largest, theirs);
            own.rescale(both);
            own.weights += __shfl_xor_sync(~0u, own.weights, other);
#pragma unroll
            for (int j = 0; j < 8; ++j) own.values[j] += __shfl_xor_sync(~0u, own.values[j], other);
        }
        if (side == 0) {
#pragma unroll
            for (int j = 0; j < 8; ++j) shared[warp][r][2 + 8 * part + j] = own.values[j];
        }
        if (lane == 0) shared[warp][r][0] = own.largest, shared[warp][r][1] = own.weights;
    }
    __syncthreads();

    // Those of the warps, and then those of the blocks, in their order.
    const int column = threadIdx.x;
    u16* const y = a.y + ((size_t)batch * ROWS * a.heads + head) * HEAD + column;
    float* const found = a.found + (size_t)blockIdx.y * gridDim.x * ROWS * FOUND;
    if (column < HEAD) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float largest = -INFINITY, weights = 0, value = 0;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared[i][r][0]);
            if (largest != -INFINITY) {
#pragma unroll
                for (int i = 0; i < WARPS; ++i) {
                    const float factor = exp2f(shared[i][r][0] - largest);
                    weights += factor * shared[i][r][1];
                    value += factor * shared[i][r][2 + column];
                }
            }
            if (gridDim.x == 1) {
                y[r * a.heads * HEAD] = from_float(weights > 0 ? value / weights : 0.f);
            } else {
                float* const to = found + ((size_t)blockIdx.x * ROWS + r) * FOUND;
                to[2 + column] = value;
                if (column == 0) to[0] = largest, to[1] = weights;
            }
        }
    }
    if (gridDim.x == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + blockIdx.y, 1) == gridDim.x - 1;
        if (last) a.arrived[blockIdx.y] = 0;
    }
    __syncthreads();
    if (!last || column >= HEAD) return;
    __threadfence();
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
        const float* const parts = found + r * FOUND;
        float largest = -INFINITY, weights = 0, value = 0;
        for (int i = 0; i < gridDim.x; ++i) largest = fmaxf(largest, __ldcg(parts + i * ROWS * FOUND));
        for (int i = 0; largest != -INFINITY && i < gridDim.x; ++i) {
            const float* const part = parts + i * ROWS * FOUND;
            const float factor = exp2f(__ldcg(part) - largest);
            weights += factor * __ldcg(part + 1);
            value += factor * __ldcg(part + 2 + column);
        }
        y[r * a.heads * HEAD] = from_float(weights > 0 ? value / weights : 0.f);
    }
}
