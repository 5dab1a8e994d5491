// Global memory accesses. Kernels access tensors only through this file, cp_async.h, bulk.h and tma.h, so that the
// simulator can count the bytes.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// PTX ISA, "Data Movement and Conversion Instructions: ld, st". The address is 16-byte aligned.
FA_DEVICE void load_16(uint32_t (&r)[4], const void* p) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(p)
                 : "memory");
}
FA_DEVICE void store_16(void* p, const uint32_t (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// One element of 2, 4 or 8 bytes, aligned to its size.
template <class T> FA_DEVICE T load(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    return *p;
}
template <class T> FA_DEVICE void store(T* p, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    *p = value;
}

// *p += value, atomically and without ordering. PTX ISA, "Parallel Synchronization ...: red".
FA_DEVICE void red_add(float* p, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(value) : "memory");
}

// *p = max(*p, value), atomically and without ordering: what many of them leave does not depend on their order. NaN is
// larger than every number, and 0 larger than -0. *p is no NaN with its sign set. Bits of numbers with equal signs are
// in the order of their magnitudes, and a set sign makes a negative integer or a large unsigned one.
FA_DEVICE void red_max(float* p, float value) {
    const uint32_t bits = value == value ? float_bits(value) : 0x7fffffffu;
    if (bits >> 31)
        asm volatile("red.global.min.u32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
    else
        asm volatile("red.global.max.s32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
}

// Atomically adds and returns the previous value, without ordering. PTX ISA, "Parallel Synchronization ...: atom".
FA_DEVICE int32_t fetch_add(int32_t* p, int32_t value) {
    int32_t before;
    asm volatile("atom.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
}

// sm_90. As red_add for four floats at a 16-byte aligned address; each float is added atomically.
FA_DEVICE void red_add_16(float* p, const float (&x)[4]) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

// A semaphore that makes blocks run in a fixed order. wait_for_turn returns once *counter >= turn (acquire: writes
// before the matching pass_turn are visible). Not ==: with invalid lengths, two sequences may share a counter, which
// can then exceed the turn. One thread calls each; a block barrier orders the other threads. PTX ISA, "Memory
// Consistency Model: Release and Acquire Patterns".
FA_DEVICE void wait_for_turn(const int32_t* counter, int32_t turn) {
    int32_t now;
    do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now < turn);
}
FA_DEVICE void pass_turn(int32_t* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace flash_attn::ptx
