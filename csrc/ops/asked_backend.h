// FLASH_ATTN_BACKEND asks for one backend by name, at every call: to compare them, or to be told why one does not run.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cstdlib>
#include <string>
#include <string_view>
#include "cuda/api.h"

namespace flash_attn {

constexpr const char* kCpuBackend = "cpu";

// Null: the best that can run a problem is to do so.
inline const char* asked_backend() {
    const char* const name = std::getenv("FLASH_ATTN_BACKEND");
    return name && *name ? name : nullptr;
}

// Raises unless the backend that is asked for is one, and for tensors on such a device.
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
