// The CUDA driver, opened when the first kernel is made: the library is built, and can be loaded, where there is none.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace slim::cuda {

using Address = uint64_t;
using Handle = void*;  // of a stream, a context, a module or a function

struct Attribute {
    int id;
    char padding[4];
    union {
        int programmatic;
        char room[64];
    } value;
};

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    Attribute* attributes;
    unsigned attribute_count;
};

constexpr int kProgrammaticStreamSerialization = 6;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr int kMultiprocessors = 16, kMajor = 75, kSharedBytesOfBlock = 97;

class Driver {
  public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    int (*cuInit)(unsigned);
    int (*cuCtxGetCurrent)(Handle*);
    int (*cuCtxSetCurrent)(Handle);
    int (*cuCtxGetDevice)(int*);
    int (*cuDevicePrimaryCtxRetain)(Handle*, int);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuModuleLoadData)(Handle*, const void*);
    int (*cuModuleGetFunction)(Handle*, Handle, const char*);
    int (*cuFuncSetAttribute)(Handle, int, int);
    int (*cuMemAlloc_v2)(Address*, size_t);
    int (*cuMemFree_v2)(Address);
    int (*cuMemcpyHtoD_v2)(Address, const void*, size_t);
    int (*cuMemsetD8Async)(Address, unsigned char, size_t, Handle);
    int (*cuLaunchKernelEx)(const LaunchConfig*, Handle, void**, void**);
    int (*cuGetErrorString)(int, const char**);

    void check(int status, const char* what) const {
        if (!status) return;
        const char* reason = nullptr;
        cuGetErrorString(status, &reason);
        throw std::runtime_error(std::string(what) + " failed: " + (reason ? reason : std::to_string(status).c_str()));
    }

    // ONNX Runtime computes in the primary context of a device, which a thread that it has just begun may not have yet.
    void enter() const {
        Handle context = nullptr;
        check(cuCtxGetCurrent(&context), "cuCtxGetCurrent");
        if (context) return;
        check(cuDevicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain");
        check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    }

  private:
    Driver() {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) throw std::runtime_error("there is no CUDA driver (libcuda.so.1) on this machine");
#define SLIM_FIND(name) find(library, #name, name)
        SLIM_FIND(cuInit);
        SLIM_FIND(cuCtxGetCurrent);
        SLIM_FIND(cuCtxSetCurrent);
        SLIM_FIND(cuCtxGetDevice);
        SLIM_FIND(cuDevicePrimaryCtxRetain);
        SLIM_FIND(cuDeviceGetAttribute);
        SLIM_FIND(cuModuleLoadData);
        SLIM_FIND(cuModuleGetFunction);
        SLIM_FIND(cuFuncSetAttribute);
        SLIM_FIND(cuMemAlloc_v2);
        SLIM_FIND(cuMemFree_v2);
        SLIM_FIND(cuMemcpyHtoD_v2);
        SLIM_FIND(cuMemsetD8Async);
        SLIM_FIND(cuLaunchKernelEx);
        SLIM_FIND(cuGetErrorString);
#undef SLIM_FIND
        check(cuInit(0), "cuInit");
    }

    template <typename Function>
    static void find(void* library, const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
    }
};

// Device memory that lives as long as this.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t size) : size_(size) {
        if (size) Driver::get().check(Driver::get().cuMemAlloc_v2(&address_, size), "allocating device memory");
    }
    Memory(Memory&& other) noexcept : address_(other.address_), size_(other.size_) { other.address_ = other.size_ = 0; }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(address_, other.address_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Memory() {
        if (address_) Driver::get().cuMemFree_v2(address_);
    }

    Address address() const { return address_; }
    size_t size() const { return size_; }

    template <typename Vector>
    static Memory of(const Vector& content) {
        const size_t size = content.size() * sizeof(content[0]);
        Memory memory(size);
        if (size) Driver::get().check(Driver::get().cuMemcpyHtoD_v2(memory.address_, content.data(), size), "copying a weight");
        return memory;
    }

  private:
    Address address_ = 0;
    size_t size_ = 0;
};

}  // namespace slim::cuda
