// Dispatches on the shared memory of the device.
#pragma once
#include <type_traits>
#include "cuda/device.h"
#include "cuda/sm80/config.h"

namespace flash_attn::cuda {

// Whether a block may use as much shared memory as tile shapes with large_smem need.
inline bool has_large_smem(const Device& device) { return device.smem_per_block >= kLargeSmemBytes; }

// Calls f(std::bool_constant<has_large_smem>).
template <class F> const char* with_smem(const Device& device, F f) {
    return has_large_smem(device) ? f(std::true_type()) : f(std::false_type());
}

}  // namespace flash_attn::cuda
