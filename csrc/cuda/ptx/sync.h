// Block, named and warp barriers, warp shuffles, proxy fences, register reallocation.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// Barrier 0, all threads of the block. PTX ISA, "Parallel Synchronization and Communication Instructions: bar".
FA_DEVICE void sync_threads() { __syncthreads(); }
// sync_threads; returns true in every thread iff the predicate is true in any thread (barrier.cta.red.or).
FA_DEVICE bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }

// Synchronises the lanes of a warp and orders their memory accesses: bar.warp.sync, same section.
FA_DEVICE void sync_warp() { __syncwarp(); }

// Named barriers 1 to 15 for `threads` threads, a multiple of 32. bar.sync waits until all of them have arrived;
// bar.arrive arrives without waiting.
FA_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FA_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// barrier_sync; returns true in all of the threads iff the predicate is true in any of them. PTX ISA, "bar.red".
FA_DEVICE bool barrier_sync_or(int id, int threads, bool predicate) {
    uint32_t any;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nbar.red.or.pred p, %1, %2, p;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"(int(predicate))
                 : "memory");
    return any != 0;
}

// The value of lane ^ mask. PTX ISA, "Data Movement and Conversion Instructions: shfl.sync".
FA_DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// sm_90. Orders this thread's generic-proxy accesses to shared memory before later async-proxy accesses (TMA, wgmma);
// the threads that issue those also need a barrier. PTX ISA, "membar, fence" and "Memory Consistency Model: Proxies".
FA_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory.
FA_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// sm_90. Returns true in exactly one lane; all lanes of the warp must call it. PTX ISA, "elect.sync".
FA_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// sm_90a. Sets the registers per thread, in all four warps of a warpgroup: dec releases registers, inc waits until
// enough are free. PTX ISA, "Miscellaneous Instructions: setmaxnreg".
template <int kRegisters> FA_DEVICE void reg_alloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> FA_DEVICE void reg_dealloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_attn::ptx
