// Warp specialization for compute capability 9.0: the first warpgroup is the producer, the others are consumers.
#pragma once
#include "cuda/ptx/sync.h"
#include "cuda/tile/gemm_sm90.h"

namespace flash_attn {

// One warp of the producer warpgroup loads; the other three scan tiles for NaN and infinity.
constexpr int kScanWarps = 3;

// Registers per thread. An SM has 65,536, so 512 for one thread of each warpgroup: the producer needs few, which leaves
// more for products and softmax in 2 or 3 consumers.
FA_HOST_DEVICE constexpr int producer_registers(int consumers) { return consumers == 2 ? 24 : 32; }
FA_HOST_DEVICE constexpr int consumer_registers(int consumers) { return consumers == 2 ? 240 : 160; }

// Called by all threads of a block: one thread runs load(), three warps scan() if kScans, the other warpgroups
// consume().
template <int kConsumers, bool kScans, class Load, class Scan, class Consume>
FA_DEVICE void warp_specialize(Load load, Scan scan, Consume consume) {
    if (warpgroup_id() == 0) {
        ptx::reg_dealloc<producer_registers(kConsumers)>();
        if (ptx::uniform(warp_id()) == 0) {
            if (ptx::elect_one()) load();
        } else if (kScans) {
            scan();
        }
    } else {
        ptx::reg_alloc<consumer_registers(kConsumers)>();
        consume();
    }
}

}  // namespace flash_attn
