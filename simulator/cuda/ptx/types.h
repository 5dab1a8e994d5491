// Host model of csrc/cuda/ptx/types.h. Every file here has the path, the names and the signatures of one in csrc/cuda,
// and forwards to runtime/sim.h.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "policy/host_device.h"
#include "runtime/element.h"
#include "runtime/sim.h"

// Inlined, as on a device: arrays that a function gets by reference then stay registers, which ThreadSanitizer need
// not watch. Not so without optimisation, where a debugger wants to step into them.
#ifdef __OPTIMIZE__
#define FA_DEVICE SIM_INLINE
#else
#define FA_DEVICE inline
#endif
#define FA_KERNEL(max_threads, min_blocks) inline void
#define FA_GRID_CONSTANT const

namespace flash_attn {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

namespace ptx {

FA_DEVICE char* smem() { return sim::smem(); }
FA_DEVICE uint32_t smem_address(const void* p) { return sim::smem_address(p); }

using SmemPtr = char*;
FA_DEVICE SmemPtr pin(SmemPtr p) { return p; }
// Shared memory begins at a multiple of 1024 bytes here too, so that the low bits are those of the address.
FA_DEVICE SmemPtr flip_bits(SmemPtr p, int bits) { return smem() + ((p - smem()) ^ bits); }
template <class T> FA_DEVICE T opaque(T x) { return x; }
FA_DEVICE int uniform(int x) { return x; }
FA_DEVICE void converge() {}

FA_DEVICE int thread_idx() { return sim::thread_idx(); }
FA_DEVICE int block_idx() { return sim::block_idx(); }

FA_DEVICE uint32_t float_bits(float x) { return sim::float_bits(x); }
FA_DEVICE float bits_float(uint32_t bits) { return sim::bits_float(bits); }
FA_DEVICE float infinity() { return bits_float(0x7f800000u); }

template <class Element> constexpr sim::Element kElement =
    std::is_same_v<Element, bf16> ? sim::Element::kBFloat16 : sim::Element::kFloat16;

template <class Element> FA_DEVICE uint32_t pack(float lo, float hi) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    if constexpr (std::is_same_v<Element, bf16>)
        return sim::float_to_bf16(lo) | uint32_t(sim::float_to_bf16(hi)) << 16;
    else
        return sim::float_to_fp16(lo) | uint32_t(sim::float_to_fp16(hi)) << 16;
}

template <class Element> FA_DEVICE float unpack_lo(uint32_t pair) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    if constexpr (std::is_same_v<Element, bf16>) return sim::bf16_to_float(uint16_t(pair));
    return sim::fp16_to_float(uint16_t(pair));
}
template <class Element> FA_DEVICE float unpack_hi(uint32_t pair) { return unpack_lo<Element>(pair >> 16); }

template <class Element> FA_DEVICE bool any_nonfinite(uint32_t pair) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    constexpr uint32_t kExponent = std::is_same_v<Element, bf16> ? 0x7f80u : 0x7c00u;
    return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

template <class Element> FA_DEVICE uint32_t mark_nonfinite(uint32_t marks, uint32_t pair) {
    for (const uint32_t half : {0xffffu, 0xffff0000u})
        if (any_nonfinite<Element>(pair & half)) marks |= 0x7fff7fffu & half;
    return marks;
}

}  // namespace ptx
}  // namespace flash_attn
