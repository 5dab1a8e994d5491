// How the warps of a block divide the work for compute capability 9.0: the first warpgroup loads tiles, the others, the
// consumers, compute.
#pragma once
#include "cuda/ptx/sync.h"
#include "cuda/tile/gemm_sm90.h"

namespace flash_attn {

// One of the four warps of the loading warpgroup loads; the others scan tiles for NaN and infinity.
constexpr int kScanWarps = 3;

// How the registers of a multiprocessor are divided, 512 for the four threads, one of each warpgroup, that share them
// with 2 consumers, or with 3: loading needs few, products and softmax all the others.
FA_HOST_DEVICE constexpr int producer_registers(int consumers) { return consumers == 2 ? 24 : 32; }
FA_HOST_DEVICE constexpr int consumer_registers(int consumers) { return consumers == 2 ? 240 : 160; }

// All threads of a block: one calls load(), three warps scan(), if there is anything to look for, and the rest
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
