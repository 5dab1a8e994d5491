// Element types, thread coordinates, shared memory addresses and conversions from fp32 to pairs of 16-bit elements.
#pragma once
#include <cstdint>
#include <type_traits>

#include "policy/host_device.h"

#define FA_DEVICE __device__ __forceinline__
// __launch_bounds__: ptxas limits the registers so that min_blocks blocks of max_threads threads fit on one SM.
#define FA_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define FA_GRID_CONSTANT const __grid_constant__

namespace flash_attn {

// Plain bits: the headers of CUDA's own types cost a second of compile time per file.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

namespace ptx {

// Dynamic shared memory of the block, aligned to 1024 bytes: the period of the 128-byte swizzle of TMA and wgmma.
extern __shared__ __align__(1024) char dynamic_smem[];
FA_DEVICE char* smem() { return dynamic_smem; }
// PTX ISA, "State Spaces": instructions on shared memory take a 32-bit address in its window.
FA_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A shared memory address as those instructions take it.
struct SmemPtr {
    uint32_t address;

    FA_DEVICE explicit SmemPtr(uint32_t a) : address(a) {}
    FA_DEVICE SmemPtr(const void* p) : address(smem_address(p)) {}
    FA_DEVICE SmemPtr operator+(int bytes) const { return SmemPtr(address + static_cast<uint32_t>(bytes)); }
};
FA_DEVICE SmemPtr flip_bits(SmemPtr p, int bits) { return SmemPtr(p.address ^ static_cast<uint32_t>(bits)); }
// The same address, opaque to the compiler, so that constants added to it become immediate offsets of loads and stores.
// Otherwise the compiler folds them into several base addresses, each in a register.
FA_DEVICE SmemPtr pin(SmemPtr p) {
    asm("" : "+r"(p.address));
    return p;
}
// The same number, opaque to the compiler, so that values derived from it are not hoisted out of a loop into registers.
FA_DEVICE uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
FA_DEVICE int opaque(int x) { return static_cast<int>(opaque(static_cast<uint32_t>(x))); }
FA_DEVICE uint64_t opaque(uint64_t x) {
    asm volatile("" : "+l"(x));
    return x;
}
template <class T> FA_DEVICE T* opaque(T* x) {
    asm volatile("" : "+l"(x));
    return x;
}
// Broadcasts lane 0's value: tells the compiler that it is warp-uniform, so that it may use a uniform register.
FA_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// Reconverges a warp after a branch that the compiler considers divergent: it keeps uniform registers only in
// convergent code.
FA_DEVICE void converge() { __syncwarp(); }

FA_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
FA_DEVICE int block_idx() { return static_cast<int>(blockIdx.x); }

FA_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FA_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
FA_DEVICE float infinity() { return bits_float(0x7f800000u); }

// PTX ISA, "Data Movement and Conversion Instructions: cvt". Rounds to nearest even; denormals are kept, NaN becomes
// 0x7fff, and overflow becomes infinity.
template <class Element> FA_DEVICE uint32_t pack(float lo, float hi) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    uint32_t pair;
    if constexpr (std::is_same_v<Element, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

template <class Element> FA_DEVICE float unpack_lo(uint32_t pair) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    if constexpr (std::is_same_v<Element, bf16>) return bits_float(pair << 16);
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(pair)));
    return x;
}
template <class Element> FA_DEVICE float unpack_hi(uint32_t pair) {
    if constexpr (std::is_same_v<Element, bf16>) return bits_float(pair & 0xffff0000u);
    return unpack_lo<Element>(pair >> 16);
}

// Whether either half is infinity or NaN: all exponent bits are set, so adding one carries into the sign.
template <class Element> FA_DEVICE bool any_nonfinite(uint32_t pair) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    constexpr uint32_t kExponents = std::is_same_v<Element, bf16> ? 0x7f807f80u : 0x7c007c00u;
    constexpr uint32_t kOnes = std::is_same_v<Element, bf16> ? 0x00800080u : 0x04000400u;
    return (((pair & kExponents) + kOnes) & 0x80008000u) != 0;
}

// marks, with each half set to NaN if that half of pair is infinity or NaN; a NaN stays. One fma: 0 * pair + marks.
// Start from marks = 0. PTX ISA, "Half Precision Floating Point Instructions: fma".
template <class Element> FA_DEVICE uint32_t mark_nonfinite(uint32_t marks, uint32_t pair) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    if constexpr (std::is_same_v<Element, bf16>)
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(marks) : "r"(pair), "r"(0));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(marks) : "r"(pair), "r"(0));
    return marks;
}

}  // namespace ptx
}  // namespace flash_attn
