// Host model of csrc/cuda/ptx/global.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE void load_16(uint32_t (&r)[4], const void* p) {
    const sim::Regs4 loaded = sim::load_16(p);
    for (int i = 0; i < 4; ++i) r[i] = loaded.r[i];
}
FA_DEVICE void store_16(void* p, const uint32_t (&r)[4]) { sim::store_16(p, {{r[0], r[1], r[2], r[3]}}); }

template <class T> FA_DEVICE T load(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    sim::note_plain_load(p, sizeof(T));
    return *p;
}
template <class T> FA_DEVICE void store(T* p, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    sim::note_plain_store(p, sizeof(T));
    *p = value;
}

FA_DEVICE void red_add(float* p, float value) { sim::red_add(p, value); }
FA_DEVICE void red_max(float* p, float value) { sim::red_max(p, value); }
FA_DEVICE int32_t fetch_add(int32_t* p, int32_t value) { return sim::fetch_add(p, value); }
FA_DEVICE void red_add_16(float* p, const float (&x)[4]) { sim::red_add_16(p, x); }
FA_DEVICE void wait_for_turn(const int32_t* counter, int32_t turn) { sim::wait_for_turn(counter, turn); }
FA_DEVICE void pass_turn(int32_t* counter) { sim::pass_turn(counter); }

}  // namespace flash_attn::ptx
