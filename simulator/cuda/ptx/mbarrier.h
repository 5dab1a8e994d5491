// Host model of csrc/cuda/ptx/mbarrier.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

constexpr int kMbarrierBytes = 8;

FA_DEVICE void mbarrier_init(void* bar, int arrivals) { sim::mbarrier_init(static_cast<uint64_t*>(bar), arrivals); }
FA_DEVICE void fence_mbarrier_init() { sim::fence_proxy_async(); }
FA_DEVICE void mbarrier_arrive(void* bar) { sim::mbarrier_arrive(static_cast<uint64_t*>(bar), 0); }
FA_DEVICE void mbarrier_arrive_expect_tx(void* bar, int bytes) {
    sim::mbarrier_arrive(static_cast<uint64_t*>(bar), bytes);
}
FA_DEVICE void mbarrier_wait(void* bar, int parity) { sim::mbarrier_wait(static_cast<uint64_t*>(bar), parity); }

}  // namespace flash_attn::ptx
