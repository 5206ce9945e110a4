// What the library calls of ONNX Runtime's C API, declared anew so that a build needs no download.
//
// The API is a table of functions to which versions only append, and OrtCustomOp a structure of which ONNX Runtime reads as
// much as the version in it says. So a library of version 18 runs in every later release. Where the public header is at hand
// (--include), the compiler compares it with the places below.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#define SLIM_PUBLIC_HEADER 1
#endif

namespace slim::ort {

constexpr uint32_t kVersion = 18;

// Where functions stand in the table.
enum Place : size_t {
    kCreateStatus = 0,
    kGetErrorMessage = 2,
    kCreateCustomOpDomain = 26,
    kCustomOpDomain_Add = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetTensorElementType = 60,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorTypeAndShape = 65,
    kKernelInfoGetAttribute_int64 = 86,
    kKernelContext_GetInput = 90,
    kKernelContext_GetOutput = 91,
    kReleaseStatus = 93,
    kReleaseTensorTypeAndShapeInfo = 99,
    kKernelContext_GetGPUComputeStream = 193,
    kKernelInfo_GetNodeName = 244,
    kKernelInfoGetConstantInput_tensor = 249,
    kKernelContext_GetResource = 265,
};

#if SLIM_PUBLIC_HEADER
#define SLIM_CHECK_PLACE(name) static_assert(offsetof(OrtApi, name) / sizeof(void*) == k##name, "the API's table has changed")
SLIM_CHECK_PLACE(CreateStatus);
SLIM_CHECK_PLACE(GetErrorMessage);
SLIM_CHECK_PLACE(CreateCustomOpDomain);
SLIM_CHECK_PLACE(CustomOpDomain_Add);
SLIM_CHECK_PLACE(AddCustomOpDomain);
SLIM_CHECK_PLACE(GetTensorMutableData);
SLIM_CHECK_PLACE(GetTensorElementType);
SLIM_CHECK_PLACE(GetDimensionsCount);
SLIM_CHECK_PLACE(GetDimensions);
SLIM_CHECK_PLACE(GetTensorTypeAndShape);
SLIM_CHECK_PLACE(KernelInfoGetAttribute_int64);
SLIM_CHECK_PLACE(KernelContext_GetInput);
SLIM_CHECK_PLACE(KernelContext_GetOutput);
SLIM_CHECK_PLACE(ReleaseStatus);
SLIM_CHECK_PLACE(ReleaseTensorTypeAndShapeInfo);
SLIM_CHECK_PLACE(KernelContext_GetGPUComputeStream);
SLIM_CHECK_PLACE(KernelInfo_GetNodeName);
SLIM_CHECK_PLACE(KernelInfoGetConstantInput_tensor);
SLIM_CHECK_PLACE(KernelContext_GetResource);
#undef SLIM_CHECK_PLACE
#endif

// Values of ONNXTensorElementDataType, OrtMemType and OrtCustomOpInputOutputCharacteristic.
constexpr int kFloat16 = 10, kInt4 = 22;
constexpr int kOnDevice = 0, kOnHost = -2;
constexpr int kRequired = 0, kOptional = 1;

#if SLIM_PUBLIC_HEADER
static_assert(kFloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 && kInt4 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, "types have changed");
static_assert(kOnDevice == OrtMemTypeDefault && kOnHost == OrtMemTypeCPUInput, "kinds of memory have changed");
static_assert(kRequired == INPUT_OUTPUT_REQUIRED && kOptional == INPUT_OUTPUT_OPTIONAL, "characteristics have changed");
#endif

// A resource of the CUDA provider (CudaResource::cublas_handle_t), and the version of that list which has it.
constexpr int kResourceVersion = 1, kCublasHandle = 10002;

struct Status;
using Table = void* const*;

struct ApiBase {
    Table (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, Table, const void* info);
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);
    int (*GetInputType)(const CustomOp*, size_t);
    size_t (*GetInputTypeCount)(const CustomOp*);
    int (*GetOutputType)(const CustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void* kernel, void* context);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const CustomOp*, size_t);
    int (*GetOutputCharacteristic)(const CustomOp*, size_t);
    int (*GetInputMemoryType)(const CustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, Table, const void* info, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, void* context);
    Status* (*InferOutputShapeFn)(const CustomOp*, void* context);
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
    size_t (*GetMayInplace)(int** inputs, int** outputs);
    void (*ReleaseMayInplace)(int* inputs, int* outputs);
    size_t (*GetAliasMap)(int** inputs, int** outputs);
    void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

#if SLIM_PUBLIC_HEADER
#define SLIM_CHECK_MEMBER(name) static_assert(offsetof(OrtCustomOp, name) == offsetof(CustomOp, name), "OrtCustomOp has changed")
SLIM_CHECK_MEMBER(version);
SLIM_CHECK_MEMBER(GetName);
SLIM_CHECK_MEMBER(GetExecutionProviderType);
SLIM_CHECK_MEMBER(GetInputType);
SLIM_CHECK_MEMBER(GetInputTypeCount);
SLIM_CHECK_MEMBER(GetOutputType);
SLIM_CHECK_MEMBER(GetOutputTypeCount);
SLIM_CHECK_MEMBER(KernelDestroy);
SLIM_CHECK_MEMBER(GetInputCharacteristic);
SLIM_CHECK_MEMBER(GetOutputCharacteristic);
SLIM_CHECK_MEMBER(GetInputMemoryType);
SLIM_CHECK_MEMBER(GetVariadicInputMinArity);
SLIM_CHECK_MEMBER(GetVariadicInputHomogeneity);
SLIM_CHECK_MEMBER(GetVariadicOutputMinArity);
SLIM_CHECK_MEMBER(GetVariadicOutputHomogeneity);
SLIM_CHECK_MEMBER(CreateKernelV2);
SLIM_CHECK_MEMBER(KernelComputeV2);
SLIM_CHECK_MEMBER(GetStartVersion);
SLIM_CHECK_MEMBER(GetEndVersion);
SLIM_CHECK_MEMBER(GetMayInplace);
SLIM_CHECK_MEMBER(ReleaseMayInplace);
SLIM_CHECK_MEMBER(GetAliasMap);
SLIM_CHECK_MEMBER(ReleaseAliasMap);
#undef SLIM_CHECK_MEMBER
#endif

// The API as calls that throw what went wrong.
class Api {
  public:
    explicit Api(Table table) : table_(table) {}

    template <typename... Arguments>
    void call(Place place, Arguments... arguments) const {
        check(reinterpret_cast<Status* (*)(Arguments...)>(table_[place])(arguments...));
    }

    Status* failure(const char* message) const {
        constexpr int kFail = 1;
        return reinterpret_cast<Status* (*)(int, const char*)>(table_[kCreateStatus])(kFail, message);
    }

    void check(Status* status) const {
        if (!status) return;
        const std::string message = reinterpret_cast<const char* (*)(const Status*)>(table_[kGetErrorMessage])(status);
        reinterpret_cast<void (*)(Status*)>(table_[kReleaseStatus])(status);
        throw std::runtime_error(message);
    }

    void release_shape(void* shape) const {
        reinterpret_cast<void (*)(void*)>(table_[kReleaseTensorTypeAndShapeInfo])(shape);
    }

    // An attribute of a node, or what it is where it is absent.
    int64_t attribute(const void* info, const char* name, int64_t otherwise) const {
        int64_t value = otherwise;
        auto* const get = reinterpret_cast<Status* (*)(const void*, const char*, int64_t*)>(table_[kKernelInfoGetAttribute_int64]);
        if (Status* const status = get(info, name, &value)) {
            reinterpret_cast<void (*)(Status*)>(table_[kReleaseStatus])(status);
            return otherwise;
        }
        return value;
    }

    std::string node_name(const void* info) const {
        size_t size = 0;
        using Get = Status* (*)(const void*, char*, size_t*);
        if (Status* const status = reinterpret_cast<Get>(table_[kKernelInfo_GetNodeName])(info, nullptr, &size))
            reinterpret_cast<void (*)(Status*)>(table_[kReleaseStatus])(status);
        std::string name(size, '\0');
        if (size) call(kKernelInfo_GetNodeName, info, name.data(), &size);
        return name.c_str();
    }

  private:
    Table table_;
};

// A tensor: where its data are, its type, its dimensions.
struct Tensor {
    void* data = nullptr;
    int type = 0;
    std::vector<int64_t> sizes;

    Tensor() = default;
    Tensor(const Api& api, const void* value) {
        void* shape = nullptr;
        size_t count = 0;
        api.call(kGetTensorTypeAndShape, value, &shape);
        api.call(kGetTensorElementType, static_cast<const void*>(shape), &type);
        api.call(kGetDimensionsCount, static_cast<const void*>(shape), &count);
        sizes.resize(count);
        if (count) api.call(kGetDimensions, static_cast<const void*>(shape), sizes.data(), count);
        api.call(kGetTensorMutableData, const_cast<void*>(value), &data);
        api.release_shape(shape);
    }

    explicit operator bool() const { return data != nullptr; }
    int64_t elements() const {
        int64_t count = 1;
        for (const int64_t size : sizes) count *= size;
        return count;
    }
};

}  // namespace slim::ort
