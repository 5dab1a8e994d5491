// From the shared memory of a device to what was known when a kernel was compiled.
#pragma once
#include <type_traits>
#include "cuda/api.h"
#include "cuda/sm80/config.h"

namespace flash_attn::cuda {

// Whether a block may have as much as the rows with large_smem need.
inline bool has_large_smem(const Device& device) { return device.smem_per_block >= kLargeSmemBytes; }

// f(std::bool_constant<has_large_smem>).
template <class F> const char* with_smem(const Device& device, F f) {
    return has_large_smem(device) ? f(std::true_type()) : f(std::false_type());
}

}  // namespace flash_attn::cuda
