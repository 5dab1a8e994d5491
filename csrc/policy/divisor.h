// Division by a divisor that is fixed at launch, as multiply and shift: GPUs have no integer division instruction.
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994), section 4.
#pragma once
#include <cstdint>
#include "policy/host_device.h"

namespace flash_attn {

// Exact for 0 <= n < 2^31: multiplier - 2^shift / divisor is in [0, 1) and 2^shift >= 2^31 divisor, so the error of the
// quotient is less than 1 / divisor.
struct Divisor {
    uint32_t divisor, multiplier;
    int32_t shift;

    FA_HOST_DEVICE int quotient(int n) const { return int(uint64_t(uint32_t(n)) * multiplier >> shift); }
    FA_HOST_DEVICE int remainder(int n) const { return n - quotient(n) * int(divisor); }
};

constexpr Divisor make_divisor(int divisor) {  // at least 1
    int shift = 31;
    while (int64_t(1) << (shift - 31) < divisor) ++shift;
    return {uint32_t(divisor), uint32_t((uint64_t(1) << shift) / uint32_t(divisor) + 1), shift};
}

}  // namespace flash_attn
