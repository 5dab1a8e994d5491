// Barriers within a block, exchange within a warp, fences between proxies, registers of a warpgroup.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// Barrier 0, all threads of the block. PTX ISA, "Parallel Synchronization and Communication Instructions: bar".
FA_DEVICE void sync_threads() { __syncthreads(); }
// As sync_threads; true in every thread iff the predicate is true in any thread of the block (barrier.cta.red.or).
FA_DEVICE bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }

// Of the lanes of a warp. Accesses before it come before those after it: of bar.warp.sync, in the same section.
FA_DEVICE void sync_warp() { __syncwarp(); }

// Barriers 1 to 15, for `threads` threads, a multiple of 32: those that sync wait for all of them, those that arrive
// do not wait.
FA_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FA_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// As barrier_sync; true in every one of the threads iff the predicate is true in any of them. PTX ISA, "bar.red".
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

// sm_90. Orders this thread's accesses to shared memory before what TMA and wgmma do there; those who issue that work
// still need a barrier. PTX ISA, "membar, fence" and "Memory Consistency Model: Proxies".
FA_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory.
FA_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// sm_90. True in exactly one lane; every lane of the warp executes it. PTX ISA, "elect.sync".
FA_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// sm_90a. Registers per thread from here on, the same in all four warps of a warpgroup: gives some back, or waits
// until there are enough to take. PTX ISA, "Miscellaneous Instructions: setmaxnreg".
template <int kRegisters> FA_DEVICE void reg_alloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> FA_DEVICE void reg_dealloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_attn::ptx
