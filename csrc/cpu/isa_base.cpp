// The baseline: SSE2 on x86-64, NEON on aarch64.
#include "cpu/isa_prelude.h"

#define FA_ISA base
#define FA_VECTOR_BYTES 16
#define FA_X86_LEVEL 0
#if defined(__aarch64__)
#define FA_MICRO_ROWS 6  // 24 of 32 registers are accumulators
#define FA_MICRO_VECTORS 4
#else
#define FA_MICRO_ROWS 4  // 8 of 16 registers are accumulators
#define FA_MICRO_VECTORS 2
#endif
#include "cpu/kernels.inl"
