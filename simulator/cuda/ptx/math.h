// Host model of csrc/cuda/ptx/math.h: exact functions, with denormals flushed to zero.
#pragma once
#include <cmath>

#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE float flush_denormal(float x) {
    return (float_bits(x) & 0x7f800000u) == 0 ? bits_float(float_bits(x) & 0x80000000u) : x;
}
FA_DEVICE float exp2(float x) { return x == x ? flush_denormal(::exp2f(x)) : bits_float(0x7fffffffu); }
FA_DEVICE float log2(float x) { return ::log2f(flush_denormal(x)); }
FA_DEVICE float reciprocal(float x) { return flush_denormal(1 / flush_denormal(x)); }

}  // namespace flash_attn::ptx
