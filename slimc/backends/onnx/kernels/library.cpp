// slim::linear for ONNX Runtime's CUDA provider: slimc's kernels behind the operator that a graph calls.
//
// Where a kernel of this name is registered ONNX Runtime runs it in place of the body that the graph brings along. The
// constants of a node stay in host memory. When a kernel is made for it they are put into the order of the tensor cores once
// and go to the device, so that it holds no second copy of a weight.
//
// Up to 16 tokens, and a few times that, are computed by decode.cu, 16 at a time or as many as find room. More are products
// of cuBLAS by the weight that expand.cu writes out as numbers. Both are compiled ahead (images.inc), so that nothing is
// compiled where this runs.

#include <array>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "driver.hpp"
#include "fragments.hpp"
#include "runtime.hpp"

namespace slim {
namespace {

enum Kind { kDecode, kExpand };

// How a launch divides the work (slimc/backends/cuda/decode.py).
struct Shape {
    int row_tiles, stages, warps;
};

// A kernel compiled for one kind of machine.
struct Image {
    Kind kind;
    int major;        // of the compute capability
    int sparse;       // decode, expand: 1 if the weight is 2:4
    int group;        // columns that share a scale, 0: all of a row
    int adapters;     // decode: 1 with R and L
    int token_tiles;  // decode: tokens / 8, rounded up
    Shape shape;      // decode
    const unsigned char* cubin;
};

#include "images.inc"  // kImages, kShapes, kOwnSharedBytes, kPartialTokens: what decode.py launches with

constexpr int kTokensAtOnce = 16;
constexpr int kMostByDecode = 48;  // three launches; beyond them it is faster to write the weight out
constexpr int kTokenTile = 8;
constexpr int kExpandThreads = 256, kExpandWaves = 8;

constexpr const char* kOperator = "linear";
constexpr const char* kDomain = "slim";

// The inputs of slim::linear, in the order of slimc/backends/onnx/functions.py.
enum Input {
    kX, kWeight, kScale, kZeroPoint, kInputScale, kLeft, kLeftScale, kRight, kRightScale, kBias,
    kSignRight, kSigns, kSignsScale, kSignLeft, kInputs,
};

bool is_codes(size_t input) { return input == kWeight || input == kZeroPoint || input == kLeft || input == kRight || input == kSigns; }

// `struct Arguments` of decode.cu.
struct DecodeArguments {
    cuda::Address x, y, codes, metadata, scale, bias, right, right_scale, left, left_scale, partial, counters, rank_range;
    int tokens, rows, columns, row_tiles, units, groups, row_scale, ranks, rank_tiles, left_units, left_steps, splits,
        split_units, chunk, steps, chunks;
};

// `struct Arguments` of expand.cu.
struct ExpandArguments {
    cuda::Address codes, metadata, scale, dense;
    uint32_t stride;
    int rows, columns, row_tiles, units, groups, row_scale;
};

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

// ----------------------------------------------------------------------------------------------------------- device

// The device of the current context, and the kernels loaded there.
class Device {
  public:
    static Device& current() {
        static std::mutex mutex;
        static std::map<int, std::unique_ptr<Device>> devices;
        const auto& driver = cuda::Driver::get();
        driver.enter();
        int number = 0;
        driver.check(driver.cuCtxGetDevice(&number), "cuCtxGetDevice");
        const std::lock_guard lock(mutex);
        auto& device = devices[number];
        if (!device) device.reset(new Device(number));
        return *device;
    }

    int processors() const { return processors_; }

    // Dynamic shared memory that a block can have.
    int shared_bytes() const { return shared_bytes_ - kOwnSharedBytes; }

    // The kernel of an image that fits, with leave for so much shared memory; null if there is none.
    cuda::Handle function(const Image& wanted, int shared_bytes) {
        const auto& driver = cuda::Driver::get();
        const Image* const image = find(wanted);
        if (!image) return nullptr;
        const std::lock_guard lock(mutex_);
        Loaded& loaded = loaded_[image];
        if (!loaded.function) {
            cuda::Handle module = nullptr;
            driver.check(driver.cuModuleLoadData(&module, image->cubin), "loading a kernel");
            const char* const name = image->kind == kDecode ? "decode_linear" : "expand_fragments";
            driver.check(driver.cuModuleGetFunction(&loaded.function, module, name), "finding a kernel");
        }
        if (shared_bytes > loaded.shared_bytes) {
            driver.check(driver.cuFuncSetAttribute(loaded.function, cuda::kMaxDynamicSharedBytes, shared_bytes), "asking for shared memory");
            loaded.shared_bytes = shared_bytes;
        }
        return loaded.function;
    }

    // Room on the device for what a call computes on the way; the next call on this stream may write over it.
    cuda::Address room(cuda::Handle stream, size_t size) {
        const std::lock_guard lock(mutex_);
        auto& rooms = rooms_[stream];
        // Smaller ones stay: a captured graph may use them.
        if (rooms.empty() || rooms.back().size() < size) rooms.emplace_back(size);
        return rooms.back().address();
    }

  private:
    struct Loaded {
        cuda::Handle function = nullptr;
        int shared_bytes = 0;
    };

    explicit Device(int number) {
        const auto& driver = cuda::Driver::get();
        driver.check(driver.cuDeviceGetAttribute(&processors_, cuda::kMultiprocessors, number), "cuDeviceGetAttribute");
        driver.check(driver.cuDeviceGetAttribute(&major_, cuda::kMajor, number), "cuDeviceGetAttribute");
        driver.check(driver.cuDeviceGetAttribute(&shared_bytes_, cuda::kSharedBytesOfBlock, number), "cuDeviceGetAttribute");
    }

    const Image* find(const Image& wanted) const {
        for (const Image& image : kImages) {
            const bool decode = image.kind == kDecode;
            if (image.kind == wanted.kind && image.major == major_ && image.sparse == wanted.sparse && image.group == wanted.group &&
                (!decode || (image.adapters == wanted.adapters && image.token_tiles == wanted.token_tiles &&
                             image.shape.row_tiles == wanted.shape.row_tiles && image.shape.stages == wanted.shape.stages &&
                             image.shape.warps == wanted.shape.warps)))
                return &image;
        }
        return nullptr;
    }

    int processors_ = 0, major_ = 0, shared_bytes_ = 0;
    std::mutex mutex_;
    std::map<const Image*, Loaded> loaded_;
    std::map<cuda::Handle, std::vector<cuda::Memory>> rooms_;
};

void launch(cuda::Handle function, int grid, int threads, int shared_bytes, cuda::Handle stream, void* arguments) {
    const auto& driver = cuda::Driver::get();
    cuda::Attribute attribute{};
    attribute.id = cuda::kProgrammaticStreamSerialization;
    attribute.value.programmatic = 1;
    cuda::LaunchConfig config{};
    config.grid[0] = static_cast<unsigned>(grid), config.grid[1] = config.grid[2] = 1;
    config.block[0] = static_cast<unsigned>(threads), config.block[1] = config.block[2] = 1;
    config.shared_bytes = static_cast<unsigned>(shared_bytes);
    config.stream = stream;
    // Only the kernel that knows how to wait for the launch before it may begin early; it takes shared memory.
    config.attributes = &attribute;
    config.attribute_count = shared_bytes ? 1 : 0;
    driver.check(driver.cuLaunchKernelEx(&config, function, &arguments, nullptr), "launching a kernel");
}

// ----------------------------------------------------------------------------------------------------------- cuBLAS

// cublasGemmEx of the library that ONNX Runtime has loaded.
class Blas {
  public:
    static const Blas& get() {
        static const Blas blas;
        return blas;
    }

    // c [n, m] (+)= b [n, k] @ a [m, k]^T, all of 16 bits and in rows, with sums in float32.
    void multiply(void* handle, cuda::Address a, cuda::Address b, cuda::Address c, int m, int n, int k, bool add) const {
        constexpr int kTransposed = 1, kAsItIs = 0, kHalf = 2, kCompute32 = 68, kDefault = -1;
        const float one = 1.f, before = add ? 1.f : 0.f;
        const int status = gemm_(handle, kTransposed, kAsItIs, m, n, k, &one, reinterpret_cast<void*>(a), kHalf, k,
                                 reinterpret_cast<void*>(b), kHalf, k, &before, reinterpret_cast<void*>(c), kHalf, m, kCompute32, kDefault);
        if (status) refuse("cublasGemmEx failed with status " + std::to_string(status));
    }

  private:
    using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                         void*, int, int, int, int);

    Blas() {
        for (const char* name : {"libcublas.so.13", "libcublas.so.12"})
            if (void* const library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) gemm_ = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
        if (!gemm_) refuse("cuBLAS, which ONNX Runtime's CUDA provider loads, is not there (libcublas.so.13 or .12)");
    }

    Gemm gemm_ = nullptr;
};

// ------------------------------------------------------------------------------------------------------------ layer

// A matrix of codes on the device.
struct Matrix {
    int row_tiles = 0, units = 0, groups = 0, row_scale = 0;
    cuda::Memory codes, metadata, scale;
};

// Scales of a matrix as a graph has them: one, [rows], or [groups, rows].
struct Scales {
    const uint16_t* numbers;
    int64_t count;
    int rows, block;  // block: rows of the graph's matrix that share one; 0: all

    uint16_t at(int row, int column) const {
        if (count == 1) return numbers[0];
        return numbers[(block ? static_cast<int64_t>(column / block) * rows : 0) + row];
    }
};

struct Layer {
    int rows = 0, columns = 0, ranks = 0;
    int sparse = 0, group = 0;  // group: of the kernel, 0, 32, 64 or 128
    Matrix weight, right, left;
    cuda::Memory bias, rank_range;

    int left_units() const { return left.units; }
    int unit_columns() const { return sparse ? 128 : 64; }
};

Codes codes_of(const ort::Tensor& tensor, const char* name) {
    if (tensor.type != ort::kInt4 || tensor.sizes.size() != 2) refuse(std::string(name) + " is no INT4 matrix");
    return {static_cast<const uint8_t*>(tensor.data), static_cast<int>(tensor.sizes[1]), static_cast<int>(tensor.sizes[0])};
}

Scales scales_of(const ort::Tensor& tensor, int rows, int64_t block) {
    const bool grouped = tensor.sizes.size() == 2;
    return {static_cast<const uint16_t*>(tensor.data), tensor.elements(), rows, grouped ? static_cast<int>(block) : 0};
}

// A factor: dense codes with a scale for every 64 columns; `rows` are those that it is filled up to.
Matrix factor_of(const ort::Tensor& tensor, const ort::Tensor& scale, int64_t block, int rows, const char* name) {
    const Codes codes = codes_of(tensor, name);
    const Scales scales = scales_of(scale, codes.rows, block);
    if (scales.block % kFactorGroup && scales.block < codes.columns)
        refuse(std::string(name) + " has groups of " + std::to_string(scales.block) + " columns; the kernel has groups of 64");
    Matrix matrix;
    const Stream stream = dense_stream(codes, rows);
    matrix.row_tiles = stream.tiles;
    matrix.units = stream.units;
    matrix.groups = divided(codes.columns, kFactorGroup);
    matrix.row_scale = 1;
    matrix.codes = cuda::Memory::of(code_words(stream));
    matrix.scale = cuda::Memory::of(scale_words(codes.rows, matrix.groups, stream.tiles, [&](int row, int group) {
        return scales.at(row, group * kFactorGroup);
    }));
    return matrix;
}

void place_weight(Layer& layer, const ort::Tensor& tensor, const ort::Tensor& scale, int64_t block, bool sparse) {
    const Codes codes = codes_of(tensor, "the weight");
    layer.rows = codes.rows;
    layer.columns = codes.columns;
    if (codes.columns % 8) refuse("the weight has " + std::to_string(codes.columns) + " columns, no multiple of 8");
    const Scales scales = scales_of(scale, codes.rows, block);
    if (scales.block && scales.block < codes.columns) layer.group = scales.block % 128 == 0 ? 128 : scales.block % 64 == 0 ? 64 : scales.block % 32 == 0 ? 32 : -1;
    if (layer.group < 0) refuse("the weight has groups of " + std::to_string(scales.block) + " columns; the kernel has groups of 32, 64 and 128");
    Matrix& weight = layer.weight;
    Stream kept(codes.rows, divided(codes.columns, 4), kZeros), places(codes.rows, divided(codes.columns, 4), kFirstTwo);
    layer.sparse = sparse && sparse_streams(codes, kept, places);
    if (layer.sparse) weight.metadata = cuda::Memory::of(metadata_words(places));
    const Stream stream = layer.sparse ? std::move(kept) : dense_stream(codes, codes.rows);
    weight.row_tiles = stream.tiles;
    weight.units = stream.units;
    weight.codes = cuda::Memory::of(code_words(stream));
    if (layer.group) {
        weight.groups = divided(codes.columns, layer.group);
        weight.scale = cuda::Memory::of(scale_words(codes.rows, weight.groups, stream.tiles, [&](int row, int group) {
            return scales.at(row, group * layer.group);
        }));
    } else {
        weight.row_scale = scales.count > 1;
        std::vector<uint16_t> numbers(weight.row_scale ? codes.rows : 1);
        for (size_t row = 0; row < numbers.size(); ++row) numbers[row] = scales.at(static_cast<int>(row), 0);
        weight.scale = cuda::Memory::of(numbers);
    }
}

Layer layer_of(const ort::Api& api, const void* info) {
    std::array<ort::Tensor, kInputs> inputs;
    for (size_t input = kWeight; input < kInputs; ++input) {
        int constant = 0;
        const void* value = nullptr;
        api.call(ort::kKernelInfoGetConstantInput_tensor, info, input, &constant, &value);
        if (constant && value) inputs[input] = ort::Tensor(api, value);
    }
    if (!inputs[kWeight] || !inputs[kScale]) refuse("its weight is not constant codes with a scale");
    for (const auto& [input, what] : {std::pair{kZeroPoint, "zero points"}, {kInputScale, "a scale of its input"}, {kSigns, "signs"}})
        if (inputs[input]) refuse(std::string("it has ") + what + ", which the kernels do not know");
    Layer layer;
    place_weight(layer, inputs[kWeight], inputs[kScale], api.attribute(info, "block_size", 0),
                 api.attribute(info, "n", 0) == 2 && api.attribute(info, "m", 0) == 4);
    if (inputs[kLeft] && inputs[kRight]) {
        if (!inputs[kLeftScale] || !inputs[kRightScale]) refuse("its adapters are not codes");
        const int rank = static_cast<int>(inputs[kLeft].sizes.at(0));
        layer.ranks = divided(rank, kFactorGroup) * kFactorGroup;
        layer.right = factor_of(inputs[kRight], inputs[kRightScale], api.attribute(info, "right_block_size", 0), layer.ranks, "the right factor");
        layer.left = factor_of(inputs[kLeft], inputs[kLeftScale], api.attribute(info, "left_block_size", 0), layer.rows, "the left factor");
        std::vector<int> range;
        for (int tile = 0; tile < layer.weight.row_tiles; ++tile) range.insert(range.end(), {0, layer.ranks / kFactorGroup});
        layer.rank_range = cuda::Memory::of(range);
    }
    if (inputs[kBias]) {
        const auto* const numbers = static_cast<const uint16_t*>(inputs[kBias].data);
        layer.bias = cuda::Memory::of(std::vector<uint16_t>(numbers, numbers + layer.rows));
    }
    return layer;
}

// ----------------------------------------------------------------------------------------------------------- kernel

// How activations come to shared memory: `chunks` pieces of `chunk` columns (slimc/backends/cuda/decode.py).
struct Staging {
    int chunk, chunks, steps, shared_bytes;
};

Staging stage(int columns, int unit, int tokens, int ranks, const Shape& shape, int available) {
    const auto shared = [&](int chunk, bool whole) {
        const int x = tokens * (2 * chunk + 16), t = ranks ? tokens * (2 * ranks + 16) : 0;
        return 16 + shape.warps * shape.row_tiles * 512 + (whole ? x + t : std::max(2 * x, t));
    };
    const int step = unit * shape.warps * shape.stages;
    int chunk = divided(columns, unit) * unit;
    if (shared(chunk, true) <= available) return {chunk, 1, divided(chunk, step) * shape.stages, shared(chunk, true)};
    chunk = step;
    while (shared(chunk + step, false) <= available) chunk += step;
    return {chunk, divided(columns, chunk), chunk / unit / shape.warps, shared(chunk, false)};
}

// The first of the shapes for which x, or two pieces of it, fit in the shared memory that is available; null if none does.
const Shape* fitting(int columns, int unit, int tokens, int ranks, int block_tiles, int available, Staging& staging) {
    const int token_tiles = divided(tokens, kTokenTile), staged = token_tiles == 1 ? tokens : token_tiles * kTokenTile;
    for (const Shape& shape : kShapes[token_tiles - 1][std::min<int>(block_tiles, std::size(kShapes[0])) - 1]) {
        staging = stage(columns, unit, staged, ranks, shape, available);
        if (staging.shared_bytes <= available) return &shape;
    }
    return nullptr;
}

class Kernel {
  public:
    Kernel(const ort::Api& api, const void* info) : api_(api), name_(api.node_name(info)) {
        Device::current();
        layer_ = layer_of(api, info);
        // As many as find room: others take several launches.
        for (int tokens = 1; tokens <= kTokensAtOnce; ++tokens) {
            const std::optional<Plan> made = plan(tokens);
            if (!made) break;
            plans_.push_back(*made);
            const DecodeArguments& a = made->arguments;
            partial_bytes_ = std::max(partial_bytes_, static_cast<size_t>(a.splits) * tokens * a.ranks * sizeof(float));
        }
        if (plans_.empty())
            refuse("one token of " + std::to_string(layer_.columns) + " columns and " + std::to_string(layer_.ranks) +
                   " ranks does not fit in the shared memory of this GPU");
    }

    void compute(void* context) {
        const void* value = nullptr;
        api_.call(ort::kKernelContext_GetInput, static_cast<const void*>(context), size_t{kX}, &value);
        const ort::Tensor x(api_, value);
        std::vector<int64_t> sizes = x.sizes;
        sizes.back() = layer_.rows;
        void* result = nullptr;
        api_.call(ort::kKernelContext_GetOutput, context, size_t{0}, static_cast<const int64_t*>(sizes.data()), sizes.size(), &result);
        const ort::Tensor y(api_, result);
        const auto tokens = static_cast<int>(x.elements() / layer_.columns);
        if (!tokens) return;
        cuda::Driver::get().enter();
        cuda::Handle stream = nullptr;
        api_.call(ort::kKernelContext_GetGPUComputeStream, static_cast<const void*>(context), &stream);
        const auto from = reinterpret_cast<cuda::Address>(x.data), to = reinterpret_cast<cuda::Address>(y.data);
        // cuBLAS adds no bias.
        if (tokens > kMostByDecode && !layer_.bias.size()) {
            expand(context, stream, from, to, tokens);
            return;
        }
        const int at_once = static_cast<int>(plans_.size());
        for (int first = 0; first < tokens; first += at_once) {
            const int count = std::min(at_once, tokens - first);
            decode(stream, from + 2ll * first * layer_.columns, to + 2ll * first * layer_.rows, count);
        }
    }

    const std::string& name() const { return name_; }

  private:
    // What launches on one stream leave behind; two take turns, since one may begin before the last one has ended.
    struct Workspace {
        cuda::Memory counters, partial;
        int turn = 0;
    };
    static constexpr size_t kCounterBytes = 16;

    struct Plan {
        cuda::Handle function;
        DecodeArguments arguments;
        int grid, threads, shared_bytes;
    };

    // Nothing if so many tokens do not fit in shared memory.
    std::optional<Plan> plan(int tokens) const {
        Device& device = Device::current();
        const int tiles = layer_.weight.row_tiles, grid = std::min(tiles, device.processors());
        Staging staging{};
        const Shape* const shape = fitting(layer_.columns, layer_.unit_columns(), tokens, layer_.ranks, divided(tiles, grid), device.shared_bytes(), staging);
        if (!shape) return std::nullopt;
        const Image wanted{kDecode, 0, layer_.sparse, layer_.group, layer_.ranks > 0, divided(tokens, kTokenTile), *shape, nullptr};
        const cuda::Handle function = device.function(wanted, staging.shared_bytes);
        if (!function)
            refuse("this library has no kernel for " + std::string(layer_.sparse ? "2:4" : "dense") + " weights with groups of " +
                   std::to_string(layer_.group) + " columns on this GPU; build it for this folder and this architecture");
        const int rank_tiles = layer_.ranks / kTileRows, column_units = divided(layer_.columns, kFactorGroup);
        int splits = std::max(1, std::min(grid / std::max(rank_tiles, 1), kPartialTokens / tokens));
        int split_units = divided(column_units, splits);
        if (staging.chunks > 1) split_units = std::min(split_units, staging.chunk / kFactorGroup);
        splits = divided(column_units, split_units);
        DecodeArguments a{};
        a.codes = layer_.weight.codes.address(), a.metadata = layer_.weight.metadata.address(), a.scale = layer_.weight.scale.address();
        a.bias = layer_.bias.address(), a.rank_range = layer_.rank_range.address();
        a.right = layer_.right.codes.address(), a.right_scale = layer_.right.scale.address();
        a.left = layer_.left.codes.address(), a.left_scale = layer_.left.scale.address();
        a.tokens = tokens, a.rows = layer_.rows, a.columns = layer_.columns, a.row_tiles = tiles;
        a.units = layer_.weight.units, a.groups = layer_.weight.groups, a.row_scale = layer_.weight.row_scale;
        a.ranks = layer_.ranks, a.rank_tiles = rank_tiles, a.left_units = layer_.left_units();
        a.left_steps = divided(a.left_units, shape->warps * shape->stages) * shape->stages;
        a.splits = splits, a.split_units = split_units;
        a.chunk = staging.chunk, a.steps = staging.steps, a.chunks = staging.chunks;
        return Plan{function, a, grid, 32 * shape->warps, staging.shared_bytes};
    }

    void decode(cuda::Handle stream, cuda::Address x, cuda::Address y, int tokens) {
        Plan made = plans_[tokens - 1];
        made.arguments.x = x, made.arguments.y = y;
        if (layer_.ranks) workspace(stream, made.arguments);
        launch(made.function, made.grid, made.threads, made.shared_bytes, stream, &made.arguments);
    }

    void workspace(cuda::Handle stream, DecodeArguments& arguments) {
        const auto& driver = cuda::Driver::get();
        const std::lock_guard lock(mutex_);
        Workspace& own = workspaces_[stream];
        if (!own.counters.size()) {
            own.partial = cuda::Memory(2 * partial_bytes_);
            own.counters = cuda::Memory(2 * kCounterBytes);
            driver.check(driver.cuMemsetD8Async(own.counters.address(), 0, 2 * kCounterBytes, stream), "clearing counters");
        }
        own.turn ^= 1;
        arguments.counters = own.counters.address() + own.turn * kCounterBytes;
        arguments.partial = own.partial.address() + own.turn * partial_bytes_;
    }

    void write_out(cuda::Handle stream, const Matrix& matrix, int sparse, int group, int rows, int columns, cuda::Address dense) const {
        Device& device = Device::current();
        const cuda::Handle function = device.function({kExpand, 0, sparse, group, 0, 0, {}, nullptr}, 0);
        if (!function) refuse("this library has no kernel that writes its weight out on this GPU");
        ExpandArguments a{};
        a.codes = matrix.codes.address(), a.metadata = sparse ? matrix.metadata.address() : 0, a.scale = matrix.scale.address();
        a.dense = dense, a.stride = static_cast<uint32_t>(columns);
        a.rows = rows, a.columns = columns, a.row_tiles = matrix.row_tiles, a.units = matrix.units;
        a.groups = matrix.groups, a.row_scale = matrix.row_scale;
        const int blocks = divided(static_cast<int64_t>(matrix.row_tiles) * matrix.units, kExpandThreads / 32);
        launch(function, std::min(blocks, kExpandWaves * device.processors()), kExpandThreads, 0, stream, &a);
    }

    void expand(void* context, cuda::Handle stream, cuda::Address x, cuda::Address y, int tokens) const {
        void* handle = nullptr;
        api_.call(ort::kKernelContext_GetResource, static_cast<const void*>(context), ort::kResourceVersion, ort::kCublasHandle, &handle);
        if (!handle) refuse("ONNX Runtime gave no handle of cuBLAS");
        const size_t rows = layer_.rows, columns = layer_.columns, ranks = layer_.ranks;
        const auto bytes = [](size_t numbers) { return (2 * numbers + 255) / 256 * 256; };
        const cuda::Address weight = Device::current().room(
            stream, bytes(rows * columns) + bytes(ranks * columns) + bytes(rows * ranks) + bytes(tokens * ranks));
        write_out(stream, layer_.weight, layer_.sparse, layer_.group, layer_.rows, layer_.columns, weight);
        const Blas& blas = Blas::get();
        blas.multiply(handle, weight, x, y, layer_.rows, tokens, layer_.columns, false);
        if (!ranks) return;
        const cuda::Address right = weight + bytes(rows * columns), left = right + bytes(ranks * columns), t = left + bytes(rows * ranks);
        write_out(stream, layer_.right, 0, kFactorGroup, layer_.ranks, layer_.columns, right);
        write_out(stream, layer_.left, 0, kFactorGroup, layer_.rows, layer_.ranks, left);
        blas.multiply(handle, right, x, t, layer_.ranks, tokens, layer_.columns, false);
        blas.multiply(handle, left, t, y, layer_.rows, tokens, layer_.ranks, true);
    }

    ort::Api api_;
    std::string name_;
    Layer layer_;
    size_t partial_bytes_ = 0;  // of any launch: a captured graph holds on to the address
    std::vector<Plan> plans_;  // for 1 token and more
    std::mutex mutex_;
    std::map<cuda::Handle, Workspace> workspaces_;
};

// --------------------------------------------------------------------------------------------------------- operator

ort::Status* create(const ort::CustomOp*, ort::Table table, const void* info, void** kernel) {
    const ort::Api api(table);
    try {
        *kernel = new Kernel(api, info);
        return nullptr;
    } catch (const std::exception& error) {
        return api.failure(("slim::linear '" + api.node_name(info) + "': " + error.what()).c_str());
    }
}

ort::Table registered = nullptr;

ort::Status* compute(void* kernel, void* context) {
    auto* const made = static_cast<Kernel*>(kernel);
    try {
        made->compute(context);
        return nullptr;
    } catch (const std::exception& error) {
        return ort::Api(registered).failure(("slim::linear '" + made->name() + "': " + error.what()).c_str());
    }
}

const ort::CustomOp& linear() {
    static const ort::CustomOp op = [] {
        ort::CustomOp made{};
        made.version = ort::kVersion;
        made.GetName = [](const ort::CustomOp*) { return kOperator; };
        made.GetExecutionProviderType = [](const ort::CustomOp*) { return "CUDAExecutionProvider"; };
        made.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; };
        made.GetInputType = [](const ort::CustomOp*, size_t input) { return is_codes(input) ? ort::kInt4 : ort::kFloat16; };
        made.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
        made.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat16; };
        made.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) { return input <= kWeight ? ort::kRequired : ort::kOptional; };
        made.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
        made.GetInputMemoryType = [](const ort::CustomOp*, size_t input) { return input == kX ? ort::kOnDevice : ort::kOnHost; };
        made.GetVariadicInputMinArity = made.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
        made.GetVariadicInputHomogeneity = made.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
        made.CreateKernelV2 = create;
        made.KernelComputeV2 = compute;
        made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        made.GetStartVersion = [](const ort::CustomOp*) { return 1; };
        made.GetEndVersion = [](const ort::CustomOp*) { return 1; };
        made.GetMayInplace = made.GetAliasMap = [](int** inputs, int** outputs) -> size_t {
            *inputs = *outputs = nullptr;
            return 0;
        };
        made.ReleaseMayInplace = made.ReleaseAliasMap = [](int*, int*) {};
        return made;
    }();
    return op;
}

}  // namespace
}  // namespace slim

// What ONNX Runtime calls for SessionOptions.register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) slim::ort::Status* RegisterCustomOps(void* options, const slim::ort::ApiBase* base) {
    using namespace slim;
    registered = base->GetApi(ort::kVersion);
    if (!registered) return nullptr;  // it says on its own that it is too old, and then has no kernel for the operator
    const ort::Api api(registered);
    try {
        void* domain = nullptr;
        api.call(ort::kCreateCustomOpDomain, kDomain, &domain);
        api.call(ort::kCustomOpDomain_Add, domain, &linear());
        api.call(ort::kAddCustomOpDomain, options, domain);
        return nullptr;
    } catch (const std::exception& error) {
        return api.failure(error.what());
    }
}

// How a launch stages its inputs, for the tests: the three numbers of its shape and the four of its staging; 0 if nothing fits.
extern "C" __attribute__((visibility("default"))) int slim_fitting(int columns, int unit, int tokens, int ranks, int block_tiles, int available, int* found) {
    using namespace slim;
    Staging staging{};
    const Shape* const shape = fitting(columns, unit, tokens, ranks, block_tiles, available, staging);
    if (!shape) return 0;
    for (const int number : {shape->row_tiles, shape->stages, shape->warps, staging.chunk, staging.chunks, staging.steps, staging.shared_bytes})
        *found++ = number;
    return 1;
}

// Fragments of codes [columns, rows], for the tests: `words` [row tiles][units][32][4], `metadata` [..][2] or null if dense.
extern "C" __attribute__((visibility("default"))) int slim_fragments(const uint8_t* bytes, int rows, int columns, uint32_t* words, uint32_t* metadata) {
    using namespace slim;
    const Codes codes{bytes, rows, columns};
    if (!metadata) {
        const auto made = code_words(dense_stream(codes, rows));
        std::memcpy(words, made.data(), made.size() * sizeof(uint32_t));
        return 1;
    }
    Stream kept(rows, divided(columns, 4), kZeros), places(rows, divided(columns, 4), kFirstTwo);
    if (!sparse_streams(codes, kept, places)) return 0;
    const auto made = code_words(kept), where = metadata_words(places);
    std::memcpy(words, made.data(), made.size() * sizeof(uint32_t));
    std::memcpy(metadata, where.data(), where.size() * sizeof(uint32_t));
    return 1;
}
