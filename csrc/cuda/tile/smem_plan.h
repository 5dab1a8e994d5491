// Plans of shared memory: a struct whose members say what lies where. There is never an object of it: kernels add
// offsetof() to the beginning of shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include "cuda/ptx/mbarrier.h"

namespace flash_attn {

// Room for so many tiles, rows of numbers or pipelines, one after another.
template <class T, int kCount = 1> struct Place { unsigned char bytes[kCount * T::kBytes]; };

using MbarrierPlace = uint64_t;
static_assert(sizeof(MbarrierPlace) == ptx::kMbarrierBytes);

template <size_t kAlignment, class... Offsets> constexpr bool are_multiples_of(Offsets... offsets) {
    return ((offsets % kAlignment == 0) && ...);
}

}  // namespace flash_attn
