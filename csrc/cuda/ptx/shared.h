// Shared memory accesses by 32-bit address. PTX ISA, "Data Movement and Conversion Instructions: ld, st".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE uint32_t load_shared(SmemPtr p) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(p.address) : "memory");
    return value;
}
FA_DEVICE void store_shared(SmemPtr p, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(p.address), "r"(value) : "memory");
}

// 8 and 16 bytes, aligned to their size.
FA_DEVICE void load_shared_8(uint32_t (&r)[2], SmemPtr p) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(p.address) : "memory");
}
FA_DEVICE void load_shared_16(uint32_t (&r)[4], SmemPtr p) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p.address)
                 : "memory");
}
FA_DEVICE void store_shared_16(SmemPtr p, const uint32_t (&r)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

}  // namespace flash_attn::ptx
