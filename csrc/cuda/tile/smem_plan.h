// Shared memory layouts: a struct whose members describe the layout. It is never instantiated: kernels add offsetof()
// to the base of shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include "cuda/ptx/mbarrier.h"

namespace flash_attn {

// Space for kCount tiles, row arrays or pipelines.
template <class T, int kCount = 1> struct Place { unsigned char bytes[kCount * T::kBytes]; };

using MbarrierPlace = uint64_t;
static_assert(sizeof(MbarrierPlace) == ptx::kMbarrierBytes);

template <size_t kAlignment, class... Offsets> constexpr bool are_multiples_of(Offsets... offsets) {
    return ((offsets % kAlignment == 0) && ...);
}

}  // namespace flash_attn
