// FLASH_ATTN_BACKEND, read at every call, forces a backend by name: to compare backends, or see why one cannot run.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cstdlib>
#include <string>
#include <string_view>
#include "cuda/api.h"

namespace flash_attn {

constexpr const char* kCpuBackend = "cpu";

// Null: the best backend that can run the problem is chosen.
inline const char* asked_backend() {
    const char* const name = std::getenv("FLASH_ATTN_BACKEND");
    return name && *name ? name : nullptr;
}

// Raises if FLASH_ATTN_BACKEND names no backend, or one that does not run on this device.
inline void check_asked_backend(c10::Device device) {
    const char* const name = asked_backend();
    if (!name) return;
    const bool is_for_cpu = name == std::string_view(kCpuBackend);
    bool is_known = is_for_cpu;
    std::string names;
    for (const cuda::BackendInfo& each : cuda::backends()) {
        is_known |= name == std::string_view(each.name);
        names += std::string(each.name) + ", ";
    }
    TORCH_CHECK(is_known, "flash_attn: FLASH_ATTN_BACKEND=", name, ": there is no such backend; there are ", names,
                kCpuBackend);
    TORCH_CHECK(is_for_cpu == device.is_cpu(), "flash_attn: FLASH_ATTN_BACKEND=", name,
                ": that backend takes tensors on ", is_for_cpu ? "the CPU" : "a CUDA device", ", and these are on ",
                device, "; move them, or unset the variable");
}

}  // namespace flash_attn
