// What the tests of the primitives share. Each test runs a small kernel on the host models or, compiled by nvcc, on a
// GPU, where it checks the assumptions of the models against the hardware.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/launch.h"
#include "cuda/ptx/types.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

// Hopper's instructions assemble for sm_90a only, so nothing else is called 900 here; the simulator has them all.
#if !defined(__CUDACC__) || __CUDA_ARCH_LIST__ == 900
#define PRIMITIVES_WITH_SM90 1
#endif

namespace flash_attn::primitives {

inline int failures;
inline void expect(bool ok, const char* what, int variant = 0) {
    std::printf("%s %s %d\n", ok ? "ok  " : "FAIL", what, variant);
    failures += !ok;
}
inline void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "primitives: %s\n", what);
    std::exit(2);
}

// ---------------------------------------------------------------- memory that host and kernels reach
#ifdef __CUDACC__
// A copy on either side. Each is brought up to date when it is needed: the device's at the next launch after the host
// has looked, the host's when it looks after a launch. Not managed memory, whose pages move under TMA.
class Memory {
public:
    explicit Memory(size_t bytes) : host_(static_cast<char*>(std::malloc(bytes))), bytes_(bytes), next_(first) {
        require(host_ && cudaMalloc(&device_, bytes) == cudaSuccess, "no memory, or no GPU");
        first = this;
    }
    ~Memory() {
        Memory** link = &first;
        while (*link != this) link = &(*link)->next_;
        *link = next_;
        std::free(host_);
        require(cudaFree(device_) == cudaSuccess, "cudaFree");
    }
    Memory(const Memory&) = delete;
    void* device() const { return device_; }
    void* host() {
        if (!host_is_newer_) copy(host_, device_, cudaMemcpyDeviceToHost);
        host_is_newer_ = true;
        return host_;
    }
    static void to_device() {
        for (Memory* each = first; each; each = each->next_) {
            if (each->host_is_newer_) each->copy(each->device_, each->host_, cudaMemcpyHostToDevice);
            each->host_is_newer_ = false;
        }
    }

private:
    void copy(void* to, const void* from, cudaMemcpyKind kind) const {
        require(cudaMemcpy(to, from, bytes_, kind) == cudaSuccess, "cudaMemcpy");
    }
    static inline Memory* first = nullptr;
    char* host_;
    void* device_ = nullptr;
    size_t bytes_;
    Memory* next_;
    bool host_is_newer_ = true;
};
inline void finish() { require(cudaDeviceSynchronize() == cudaSuccess, "a kernel failed"); }
inline cuda::Device device() {
    int smem = 0;
    cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    return {90, smem, 1, 1, nullptr};
}
#else
class Memory {
public:
    explicit Memory(size_t bytes) : bytes_(std::aligned_alloc(256, (bytes + 255) / 256 * 256)) {}
    ~Memory() { std::free(bytes_); }
    Memory(const Memory&) = delete;
    void* device() const { return bytes_; }
    void* host() { return bytes_; }
    static void to_device() {}

private:
    void* bytes_;
};
inline void finish() {}
inline cuda::Device device() { return {90, 227 << 10, 1, 1, nullptr}; }
#endif

template <class T> struct Buffer {
    Memory memory;
    T* data;  // the kernels'
    int size;
    explicit Buffer(int n) : memory(static_cast<size_t>(n) * sizeof(T)), size(n) {
        data = static_cast<T*>(memory.device());
        fill(T{});
    }
    void fill(T value) {
        for (int i = 0; i < size; ++i) (*this)[i] = value;
    }
    T& operator[](int i) { return static_cast<T*>(memory.host())[i]; }
    operator T*() { return data; }
};

// Launches, and ends the program if that was impossible. overlaps: may begin before the last kernel has ended.
template <class... Params, class... Args>
void launch(bool overlaps, void (*kernel)(Params...), int blocks, int threads, int smem_bytes, Args... args) {
    Memory::to_device();
    const char* error =
        cuda::launch_kernel(overlaps, kernel, blocks, threads, smem_bytes, device(), static_cast<Params>(args)...);
    require(!error, error);
}
// Waits as well.
template <class... Params, class... Args>
void run(void (*kernel)(Params...), int blocks, int threads, int smem_bytes, Args... args) {
    launch(false, kernel, blocks, threads, smem_bytes, args...);
    finish();
}

// ---------------------------------------------------------------- bytes of global memory, which a GPU does not tell
struct Traffic { int64_t read, written, added; };
struct Counted { Traffic cp_async, tma, bulk, plain, red; };
#ifdef __CUDACC__
inline void reset_traffic() {}
inline void expect_traffic(const Counted&, const char*) {}
#else
inline void reset_traffic() { sim::counters = {}; }
inline void expect_traffic(const Counted& x, const char* what) {
    const sim::Counters& c = sim::counters;
    auto same = [](const sim::Traffic& a, const Traffic& b) {
        return a.read == b.read && a.written == b.written && a.added == b.added;
    };
    const bool ok = same(c.cp_async, x.cp_async) && same(c.tma, x.tma) && same(c.bulk, x.bulk) &&
                    same(c.plain, x.plain) && same(c.red, x.red);
    std::printf("%s bytes counted: %s\n", ok ? "ok  " : "FAIL", what);
    failures += !ok;
}
#endif

// ---------------------------------------------------------------- 16-bit elements
// Exact in both types, and sums of a few products of two are exact in fp32.
inline float small_value(int i) { return static_cast<float>((i * 7 + i / 16 * 3 + i / 64 * 5) % 17 - 8); }

// Of a small value: written again, so that the test does not depend on what it tests.
template <class Element> uint16_t small_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (std::is_same_v<Element, bf16>) return static_cast<uint16_t>(u >> 16);
    return x == 0 ? 0 : static_cast<uint16_t>((u >> 16 & 0x8000) | ((u & 0x7fffffff) - 0x38000000) >> 13);
}
template <class Element> void fill_small(Buffer<uint16_t>& b) {
    for (int i = 0; i < b.size; ++i) b[i] = small_bits<Element>(small_value(i));
}
template <class Element> const char* type_name() { return std::is_same_v<Element, bf16> ? "bf16" : "fp16"; }

// ---------------------------------------------------------------- the groups of tests
void test_memory();   // memory.cpp: copies, global accesses, semaphores
void test_warp();     // warp.cpp: barriers, fragments, products, exchange
void test_numbers();  // numbers.cpp: conversions, functions
// Nothing in builds for other architectures.
void test_sm90();        // sm90.cpp: TMA, mbarrier and more
void test_rows_sm90();   // tiles_sm90.cpp: rows of a sequence by TMA
void test_tiles_sm90();  // tiles_sm90.cpp: products of tiles
void test_wgmma();       // wgmma.cpp

}  // namespace flash_attn::primitives
