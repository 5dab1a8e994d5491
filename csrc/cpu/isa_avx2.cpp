// AVX2 with FMA and F16C: Haswell, Zen and later.
#if defined(__x86_64__)
#include "cpu/isa_prelude.h"

#define FA_ISA avx2
#define FA_VECTOR_BYTES 32
#define FA_X86_LEVEL 2
#define FA_MICRO_ROWS 6  // 12 of 16 registers are accumulators
#define FA_MICRO_VECTORS 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "cpu/kernels.inl"
#pragma GCC pop_options
#endif
