// Host model of csrc/cuda/ptx/shared.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE uint32_t load_shared(const char* p) {
    sim::check_shared(p, 4);
    return *reinterpret_cast<const uint32_t*>(p);
}
FA_DEVICE void store_shared(char* p, uint32_t value) {
    sim::check_shared(p, 4);
    *reinterpret_cast<uint32_t*>(p) = value;
}
FA_DEVICE void load_shared_8(uint32_t (&r)[2], const char* p) {
    sim::check_shared(p, 8);
    for (int i = 0; i < 2; ++i) r[i] = reinterpret_cast<const uint32_t*>(p)[i];
}
FA_DEVICE void load_shared_16(uint32_t (&r)[4], const char* p) {
    sim::check_shared(p, 16);
    for (int i = 0; i < 4; ++i) r[i] = reinterpret_cast<const uint32_t*>(p)[i];
}
FA_DEVICE void store_shared_16(char* p, const uint32_t (&r)[4]) {
    sim::check_shared(p, 16);
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(p)[i] = r[i];
}

}  // namespace flash_attn::ptx
