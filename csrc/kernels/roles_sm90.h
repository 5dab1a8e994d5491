// How the warps of a block divide the work for compute capability 9.0: the first warpgroup loads tiles, the others, the
// consumers, compute.
#pragma once
#include "ptx/sync.h"
#include "tile/gemm_sm90.h"

namespace flash_attn {

constexpr int kSm90SmemBytes = 227 * 1024;  // that a block may have

// Of the four warps of the warpgroup that loads one does so; these have time to look for NaN and infinity.
constexpr int kInspectors = 3;

// How the registers of a multiprocessor are divided, 512 for the four threads, one of each warpgroup, that share them
// with 2 consumers, or with 3: loading needs few, products and softmax all the others.
FA_HOST_DEVICE constexpr int producer_registers(int consumers) { return consumers == 2 ? 24 : 32; }
FA_HOST_DEVICE constexpr int consumer_registers(int consumers) { return consumers == 2 ? 240 : 160; }

// All threads of a block: one calls load(), three warps inspect(), if there is anything to look for, and the rest
// consume().
template <int kConsumers, bool kInspects, class Load, class Inspect, class Consume>
FA_DEVICE void run_roles(Load load, Inspect inspect, Consume consume) {
    if (warpgroup_id() == 0) {
        ptx::reg_dealloc<producer_registers(kConsumers)>();
        if (ptx::uniform(warp_id()) == 0) {
            if (ptx::elect_one()) load();
        } else if (kInspects) {
            inspect();
        }
    } else {
        ptx::reg_alloc<consumer_registers(kConsumers)>();
        consume();
    }
}

}  // namespace flash_attn
