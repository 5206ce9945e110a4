// What a decoder does between its linears, ahead of one of them: a residual and a norm, or a gate.
//
// The launches of that linear may begin at once: they bring their weights, and wait before they read what is written here.
//
// Compiled with -D, besides those of common.cuh:
//   CHUNKS  of 8 columns that a thread has of a token, for add_norm

struct alignas(16) Chunk { u16 number[8]; };

__device__ __forceinline__ float rounded(float f) { return to_float(from_float(f)); }

// sum = x + residual, y = weight * (sum / sqrt(mean(sum^2) + epsilon)), each rounded as PyTorch's operators round.
// A block has a token; x, residual, sum, y [tokens][columns].
extern "C" __global__ void add_norm(const u16* x, const u16* residual, const u16* weight, u16* sum, u16* y, int columns, float epsilon) {
    __shared__ float of_warps[32];
    if (threadIdx.x == 0) let_next_launch_begin();
    const size_t first = (size_t)blockIdx.x * columns;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Chunk scale[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int column = 8 * (threadIdx.x + i * blockDim.x);
        if (column < columns) scale[i] = *(const Chunk*)(weight + column);
    }
    wait_for_previous_launch();
    float numbers[CHUNKS][8], squares = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int column = 8 * (threadIdx.x + i * blockDim.x);
        if (column >= columns) continue;
        const Chunk a = *(const Chunk*)(x + first + column), b = *(const Chunk*)(residual + first + column);
        Chunk added;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            added.number[j] = from_float(to_float(a.number[j]) + to_float(b.number[j]));
            numbers[i][j] = to_float(added.number[j]);
            squares += numbers[i][j] * numbers[i][j];
        }
        *(Chunk*)(sum + first + column) = added;
    }
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    if (lane == 0) of_warps[warp] = squares;
    __syncthreads();
    squares = lane < blockDim.x / 32 ? of_warps[lane] : 0.f;
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    const float factor = rsqrtf(squares / columns + epsilon);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int column = 8 * (threadIdx.x + i * blockDim.x);
        if (column >= columns) continue;
        Chunk normed;
#pragma unroll
        for (int j = 0; j < 8; ++j) normed.number[j] = from_float(to_float(scale[i].number[j]) * rounded(numbers[i][j] * factor));
        *(Chunk*)(y + first + column) = normed;
    }
}

// y = silu(gate) * up, rounded in between; gate and up [tokens][columns] at strides, y without.
extern "C" __global__ void gate(const u16* gates, const u16* ups, u16* y, int columns, long long gate_stride, long long up_stride) {
    if (threadIdx.x == 0) let_next_launch_begin();
    const int column = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    wait_for_previous_launch();
    if (column >= columns) return;
    const Chunk a = *(const Chunk*)(gates + blockIdx.y * gate_stride + column), b = *(const Chunk*)(ups + blockIdx.y * up_stride + column);
    Chunk product;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float v = to_float(a.number[j]);
        product.number[j] = from_float(rounded(v / (1.f + expf(-v))) * to_float(b.number[j]));
    }
    *(Chunk*)(y + (size_t)blockIdx.y * columns + column) = product;
}
