// Approximate functions of the special function unit (MUFU). PTX ISA, "Floating Point Instructions: ex2, lg2, rcp".
// Denormal inputs and results are flushed to zero (.ftz), which avoids scaling instructions around each of them.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// 2^x, relative error 2^-22; exp2(-infinity) is 0. NaN has no sign bit.
FA_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Absolute error 2^-22 for x in [0.5, 2], relative error 2^-22 elsewhere; log2(0) is -infinity, log2(1) is 0.
FA_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, error at most 1 ulp; reciprocal(0) is infinity.
FA_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace flash_attn::ptx
