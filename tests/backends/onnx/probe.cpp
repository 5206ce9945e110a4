// An operator of ONNX Runtime's CPU provider that calls what runtime.hpp declares: y = x * attribute + constant.
#include "runtime.hpp"

namespace {

using namespace slim::ort;

Table table = nullptr;

struct Kernel {
    int64_t factor;
    float constant;
};

Status* create(const CustomOp*, Table given, const void* info, void** kernel) {
    const Api api(given);
    try {
        if (api.node_name(info) != "probe") throw std::runtime_error("another name");
        int constant = 0;
        const void* value = nullptr;
        api.call(kKernelInfoGetConstantInput_tensor, info, size_t{1}, &constant, &value);
        if (!constant) throw std::runtime_error("no constant");
        *kernel = new Kernel{api.attribute(info, "factor", 1), *static_cast<const float*>(Tensor(api, value).data)};
        return nullptr;
    } catch (const std::exception& error) {
        return api.failure(error.what());
    }
}

Status* compute(void* made, void* context) {
    const Api api(table);
    const auto* const kernel = static_cast<const Kernel*>(made);
    try {
        const void* input = nullptr;
        void* output = nullptr;
        api.call(kKernelContext_GetInput, static_cast<const void*>(context), size_t{0}, &input);
        const Tensor x(api, input);
        if (x.sizes.size() != 2) throw std::runtime_error("this is no matrix");
        api.call(kKernelContext_GetOutput, context, size_t{0}, x.sizes.data(), x.sizes.size(), &output);
        const Tensor y(api, output);
        for (int64_t index = 0; index < x.elements(); ++index)
            static_cast<float*>(y.data)[index] = static_cast<const float*>(x.data)[index] * kernel->factor + kernel->constant;
        return nullptr;
    } catch (const std::exception& error) {
        return api.failure(error.what());
    }
}

CustomOp made_operator() {
    constexpr int kFloat = 1;
    CustomOp op{};
    op.version = kVersion;
    op.GetName = [](const CustomOp*) { return "Probe"; };
    op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 2; };
    op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
    op.GetInputType = op.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
    op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
    op.GetInputMemoryType = [](const CustomOp*, size_t) { return kOnDevice; };
    op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.GetStartVersion = op.GetEndVersion = [](const CustomOp*) { return 1; };
    op.GetMayInplace = op.GetAliasMap = [](int** inputs, int** outputs) -> size_t {
        *inputs = *outputs = nullptr;
        return 0;
    };
    op.ReleaseMayInplace = op.ReleaseAliasMap = [](int*, int*) {};
    return op;
}

}  // namespace

extern "C" Status* RegisterCustomOps(void* options, const ApiBase* base) {
    static const CustomOp op = made_operator();
    table = base->GetApi(kVersion);
    const Api api(table);
    void* domain = nullptr;
    api.call(kCreateCustomOpDomain, "tried", &domain);
    api.call(kCustomOpDomain_Add, domain, &op);
    api.call(kAddCustomOpDomain, options, domain);
    return nullptr;
}
