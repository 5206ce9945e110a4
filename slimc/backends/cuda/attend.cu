// A new token of each sequence, from its projections to its attention: q and k are turned by the position (RoPE), k and v
// are put into the cache, and y = softmax(scale * q @ keys^T, where the mask allows) @ values.
//
// A cluster of blocks shares the keys of a head, a block a run of them, a warp 16 at a time. What the cache holds of
// earlier tokens does not depend on the launch before this one: the first keys and values of a warp are on their way
// before it waits. Pieces of 16 that the mask hides are not read after that, so what is not filled yet costs nothing.
// Warps of a block and then blocks of a cluster put together what they have found, in their order.
//
// Compiled with -D, besides those of common.cuh:
//   HEAD   numbers of a query, a key or a value: 64 or 128
//   ROWS   heads of queries that read the same keys
//   MASK   1: bytes say which keys a query may see; 0: it sees all
//   BLOCKS of a cluster

#define INFINITY __int_as_float(0x7f800000)
#define WARPS 8                   // of a block, at most
#define PIECE 16                  // keys that a warp takes at a time
#define LANES (HEAD / 8)          // that hold a key, 8 numbers each
#define AT_ONCE (32 / LANES)      // keys that a warp holds side by side
#define STEPS (PIECE / AT_ONCE)
#define FOUND (HEAD + 2)          // what is found for a query: the largest score, the sum of weights, of values

struct Arguments {
    const u16* q;    // [batch][heads * ROWS][HEAD], at strides
    const u16* k;    // [batch][heads][HEAD], at strides
    const u16* v;
    const u16* cos;  // [batch][HEAD], at a stride
    const u16* sin;
    u16* keys;       // [batch][heads][length][HEAD], at strides
    u16* values;
    const long long* position;  // of the new token in the cache
    const unsigned char* mask;  // [batch][heads * ROWS][length], at strides, if MASK
    u16* y;          // [batch][heads * ROWS][HEAD]
    long long q_strides[2], k_strides[2], v_strides[2], turn_strides[2], keys_strides[3], values_strides[3], mask_strides[3];
    float scale;     // times log2(e)
    int heads;       // of keys
    int length;
    int run;         // keys of a block
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

__device__ __forceinline__ uint4 pack(const float (&f)[8]) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = from_float(f[2 * i]) | (u32)from_float(f[2 * i + 1]) << 16;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Loads that stay behind the wait for the launch before.
__device__ __forceinline__ uint4 load_new(const u16* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// x * cos + (-second half, first half) * sin; each half is in half of the lanes.
__device__ __forceinline__ uint4 turn(const uint4& words, const float (&cosine)[8], const float (&sine)[8], int part) {
    float x[8], turned[8];
    unpack(x, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float other = __shfl_xor_sync(~0u, x[i], LANES / 2);
        turned[i] = x[i] * cosine[i] + (part < LANES / 2 ? -other : other) * sine[i];
    }
    return pack(turned);
}

__device__ __forceinline__ float load_of_block(const float* p, int block) {
    float v;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(v) : "r"(shared_address(p)), "r"(block) : "memory");
    return v;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, ROWS == 1 ? 2 : 1) attend(const __grid_constant__ Arguments a) {
    __shared__ float of_warps[WARPS][ROWS][FOUND];
    __shared__ float of_block[ROWS][FOUND];
    const int warps = blockDim.x / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, side = lane / LANES;
    const int batch = blockIdx.y / a.heads, head = blockIdx.y % a.heads;
    u16* const k = a.keys + batch * a.keys_strides[0] + head * a.keys_strides[1] + 8 * part;
    u16* const v = a.values + batch * a.values_strides[0] + head * a.values_strides[1] + 8 * part;
    const int begin = blockIdx.x * a.run, end = min(begin + a.run, a.length);
    const long long position = *a.position;

    uint4 keys[STEPS], values[STEPS];
    auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const long long key = min(first + i * AT_ONCE + side, a.length - 1);
            keys[i] = load_once((const uint4*)(k + key * a.keys_strides[2]));
            values[i] = load_once((const uint4*)(v + key * a.values_strides[2]));
        }
    };
    int first = begin + warp * PIECE;
    bool loaded = first < end && first <= position;
    if (loaded) load(first);

    wait_for_previous_launch();
    let_next_launch_begin();
    float cosine[8], sine[8];
    unpack(cosine, load_new(a.cos + batch * a.turn_strides[0] + 8 * part));
    unpack(sine, load_new(a.sin + batch * a.turn_strides[1] + 8 * part));
    const uint4 new_value = load_new(a.v + batch * a.v_strides[0] + head * a.v_strides[1] + 8 * part);
    const uint4 new_key = turn(load_new(a.k + batch * a.k_strides[0] + head * a.k_strides[1] + 8 * part), cosine, sine, part);
    float q[ROWS][8];
    Sums sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u16* const from = a.q + batch * a.q_strides[0] + (head * ROWS + r) * a.q_strides[1] + 8 * part;
        unpack(q[r], turn(load_new(from), cosine, sine, part));
        sums[r] = {-INFINITY, 0.f, {}};
    }
    if (warp == 0 && side == 0 && begin <= position && position < end) {
        *(uint4*)(k + position * a.keys_strides[2]) = new_key;
        *(uint4*)(v + position * a.values_strides[2]) = new_value;
    }

    for (; first < end; first += warps * PIECE, loaded = false) {
        // A lane knows of one key which queries see it.
        u32 seen = 0;
        const int own = first + lane;
        if (lane < PIECE && own < end) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const unsigned char* const mask = a.mask + batch * a.mask_strides[0] + (head * ROWS + r) * a.mask_strides[1];
                if (!MASK || mask[own * a.mask_strides[2]]) seen |= 1u << r;
            }
        }
        if (!__any_sync(~0u, seen)) continue;
        if (!loaded) load(first);
        float scores[ROWS][STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            if (first + i * AT_ONCE + side == position) keys[i] = new_key, values[i] = new_value;
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
                // What a hidden key's place holds may be no number.
                if (scores[r][i] > 0) {
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
            for (int j = 0; j < 8; ++j) of_warps[warp][r][2 + 8 * part + j] = own.values[j];
        }
        if (lane == 0) of_warps[warp][r][0] = own.largest, of_warps[warp][r][1] = own.weights;
    }
    __syncthreads();

    // Those of the warps, and then those of the blocks, in their order.
    u16* const y = a.y + ((size_t)batch * a.heads + head) * ROWS * HEAD;
    for (int i = threadIdx.x; i < ROWS * HEAD; i += blockDim.x) {
        const int r = i / HEAD, column = i % HEAD;
        float largest = -INFINITY, weights = 0, value = 0;
        for (int w = 0; w < warps; ++w) largest = fmaxf(largest, of_warps[w][r][0]);
        for (int w = 0; largest != -INFINITY && w < warps; ++w) {
            const float factor = exp2f(of_warps[w][r][0] - largest);
            weights += factor * of_warps[w][r][1];
            value += factor * of_warps[w][r][2 + column];
        }
#if BLOCKS == 1
        y[i] = from_float(weights != 0 ? value / weights : 0.f);
#else
        of_block[r][2 + column] = value;
        if (column == 0) of_block[r][0] = largest, of_block[r][1] = weights;
#endif
    }
#if BLOCKS > 1
    cluster_arrive();
    cluster_wait();
    // A block writes its part of the results.
    for (int i = (threadIdx.x / 32 * BLOCKS + blockIdx.x) * 32 + lane; i < ROWS * HEAD; i += blockDim.x * BLOCKS) {
        const int r = i / HEAD, column = i % HEAD;
        // All are asked for before the first is needed.
        float largests[BLOCKS], all_weights[BLOCKS], all_values[BLOCKS];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            largests[block] = load_of_block(&of_block[r][0], block);
            all_weights[block] = load_of_block(&of_block[r][1], block);
            all_values[block] = load_of_block(&of_block[r][2 + column], block);
        }
        float largest = -INFINITY, weights = 0, value = 0;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) largest = fmaxf(largest, largests[block]);
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const float factor = largests[block] == -INFINITY ? 0.f : exp2f(largests[block] - largest);
            weights += factor * all_weights[block];
            value += factor * all_values[block];
        }
        y[i] = from_float(weights != 0 ? value / weights : 0.f);
    }
    // No block leaves while others read what it has found.
    cluster_arrive();
    cluster_wait();
#endif
}
