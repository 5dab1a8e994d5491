// AVX-512: Skylake-SP, Zen 4 and later.
#if defined(__x86_64__)
#include "cpu/isa_prelude.h"

#define FA_ISA avx512
#define FA_VECTOR_BYTES 64
#define FA_X86_LEVEL 3
#define FA_MICRO_ROWS 6  // 24 of 32 registers are accumulators
#define FA_MICRO_VECTORS 4
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#include "cpu/kernels.inl"
#pragma GCC pop_options
#endif
