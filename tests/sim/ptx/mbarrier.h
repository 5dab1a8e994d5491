// Host model of csrc/ptx/mbarrier.h.
#pragma once
#include "ptx/types.h"

namespace flash_attn::ptx {

using Mbarrier = uint64_t;

FA_DEVICE void mbarrier_init(Mbarrier* bar, int arrivals) { sim::mbarrier_init(bar, arrivals); }
FA_DEVICE void fence_mbarrier_init() { sim::fence_proxy_async(); }
FA_DEVICE void mbarrier_arrive(Mbarrier* bar) { sim::mbarrier_arrive(bar, 0); }
FA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* bar, int bytes) { sim::mbarrier_arrive(bar, bytes); }
FA_DEVICE void mbarrier_wait(Mbarrier* bar, int parity) { sim::mbarrier_wait(bar, parity); }

}  // namespace flash_attn::ptx
