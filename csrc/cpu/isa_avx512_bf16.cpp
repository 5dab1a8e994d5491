// AVX-512 with bfloat16 dot products: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#if defined(__x86_64__)
#include "cpu/isa_prelude.h"

#define FA_ISA avx512_bf16
#define FA_VECTOR_BYTES 64
#define FA_X86_LEVEL 3
#define FA_BF16_DOT 1
#define FA_MICRO_ROWS 6  // 24 of 32 registers are accumulators
#define FA_MICRO_VECTORS 4
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#include "cpu/kernels.inl"
#pragma GCC pop_options
#endif
