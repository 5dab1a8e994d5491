// Host model of csrc/cuda/ptx/sync.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE void sync_threads() { sim::sync_threads(); }
FA_DEVICE bool sync_threads_or(bool predicate) { return sim::sync_threads_or(predicate); }
FA_DEVICE void sync_warp() { sim::sync_warp(); }
FA_DEVICE void barrier_sync(int id, int threads) { sim::barrier_sync(id, threads); }
FA_DEVICE void barrier_arrive(int id, int threads) { sim::barrier_arrive(id, threads); }
FA_DEVICE bool barrier_sync_or(int id, int threads, bool predicate) {
    return sim::barrier_sync_or(id, threads, predicate);
}
FA_DEVICE float shfl_xor(float x, int mask) { return sim::shfl_xor(x, mask); }
FA_DEVICE void fence_proxy_async() { sim::fence_proxy_async(); }
FA_DEVICE void fence_proxy_async_global() { sim::fence_proxy_async(); }
FA_DEVICE bool elect_one() { return sim::elect_one(); }
template <int kRegisters> FA_DEVICE void reg_alloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    sim::set_max_registers(kRegisters);
}
template <int kRegisters> FA_DEVICE void reg_dealloc() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    sim::set_max_registers(kRegisters);
}

}  // namespace flash_attn::ptx
