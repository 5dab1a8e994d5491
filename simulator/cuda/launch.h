// Host model of csrc/cuda/launch.h: a launch runs the kernel on the simulator and returns when it has ended.
#pragma once
#include <cstring>
#include "cuda/device.h"
#include "runtime/sim.h"

namespace flash_attn::cuda {

// Null, or what a device would refuse the launch for.
inline const char* launch_error(int64_t blocks, int threads, int smem_bytes, const Device& device) {
    if (blocks < 0 || blocks > INT32_MAX) return "the problem has more than 2^31 - 1 tiles";
    if (threads < 1 || threads > 1024) return "invalid argument: threads per block";
    if (smem_bytes < 0 || smem_bytes > device.smem_per_block) return "invalid argument: shared memory per block";
    return nullptr;
}

template <class... Params, class... Args> const char* launch_kernel(bool overlaps, void (*kernel)(Params...),
                                                                    int64_t blocks, int threads, int smem_bytes,
                                                                    const Device& device, const Args&... args) {
    if (const char* error = launch_error(blocks, threads, smem_bytes, device)) return error;
    if (blocks == 0) return nullptr;
    auto body = [=] { kernel(args...); };
    sim::launch(
        {reinterpret_cast<const void*>(kernel), blocks, threads, static_cast<size_t>(smem_bytes), overlaps},
        [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body, sizeof body);
    return nullptr;
}
template <class... Params, class... Args> const char* launch(void (*kernel)(Params...), int64_t blocks, int threads,
                                                             int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(false, kernel, blocks, threads, smem_bytes, device, args...);
}
template <class... Params, class... Args> const char* launch_pdl(void (*kernel)(Params...), int64_t blocks, int threads,
                                                                 int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(true, kernel, blocks, threads, smem_bytes, device, args...);
}

inline const char* clear(void* memory, size_t bytes, const Device&) {
    std::memset(memory, 0, bytes);
    return nullptr;
}

}  // namespace flash_attn::cuda
