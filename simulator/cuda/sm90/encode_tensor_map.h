// Host model of csrc/cuda/sm90/encode_tensor_map.h.
#pragma once
#include <array>
#include <cstdint>
#include <cstdio>
#include "runtime/sim.h"

namespace flash_attn::cuda {

inline const char* refusal(const char* name, const char* why) {
    static char text[80];
    std::snprintf(text, sizeof text, "the CUDA driver refuses a tensor map of %s: %s", name, why);
    return text;
}

inline const char* encode_tensor_map(const char* name, sim::TensorMap& map, void* base, std::array<int64_t, 4> sizes,
                                     std::array<int64_t, 3> stride_bytes, std::array<int, 4> box) {
    constexpr int64_t kMaxSize = int64_t(1) << 32, kMaxStride = int64_t(1) << 40;
    map = {base, 4, 2, {}, {}, {}, 128};
    for (size_t i = 0; i < 4; ++i) {
        map.dim[i] = sizes[i];
        map.box[i] = box[i];
        if (i) map.stride_bytes[i] = stride_bytes[i - 1];
        if (sizes[i] < 1 || sizes[i] > kMaxSize) return refusal(name, "size");
        if (i && (map.stride_bytes[i] % 16 || map.stride_bytes[i] <= 0 || map.stride_bytes[i] >= kMaxStride))
            return refusal(name, "stride");
    }
    return reinterpret_cast<uintptr_t>(base) % 16 ? refusal(name, "address") : nullptr;
}

}  // namespace flash_attn::cuda
