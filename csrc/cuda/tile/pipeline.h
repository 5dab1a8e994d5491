// A ring of stages in shared memory that one thread fills by TMA and several warps empty.
#pragma once
#include "cuda/ptx/mbarrier.h"
#include "cuda/tile/lane.h"

namespace flash_attn {

// Which stage is next, and the parity of the phase that its barriers are in. Whoever uses a pipeline counts for itself.
template <int kStages> struct StageIndex {
    int stage = 0, parity = 0;

    FA_DEVICE void advance() {
        const bool wraps = stage + 1 == kStages;
        stage = wraps ? 0 : stage + 1;
        parity ^= int(wraps);
    }
};

// Two barriers per stage: `full` completes when the bytes have come, `empty` when all warps have released the stage.
template <int kStages_> struct Pipeline {
    static constexpr int kStages = kStages_, kBytes = 2 * kStages * ptx::kMbarrierBytes;
    using Index = StageIndex<kStages>;
    ptx::SmemPtr base;

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }
    FA_DEVICE ptx::SmemPtr full(int stage) const { return base + stage * ptx::kMbarrierBytes; }
    FA_DEVICE ptx::SmemPtr empty(int stage) const { return base + (kStages + stage) * ptx::kMbarrierBytes; }

    // One thread of the block; all others wait for it at a block barrier.
    FA_DEVICE void init(int releases) const {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(full(stage), 1);
            ptx::mbarrier_init(empty(stage), releases);
        }
    }
    // The filling thread: waits until the stage is free, which it is at first.
    FA_DEVICE void wait_until_free(Index at) const { ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1); }
    // The same, and announces what will come. Returns the barrier that is to count the bytes.
    FA_DEVICE ptx::SmemPtr acquire(Index at, int bytes) const {
        wait_until_free(at);
        ptx::mbarrier_arrive_expect_tx(full(at.stage), bytes);
        return full(at.stage);
    }
    // Every thread that looks at the stage.
    FA_DEVICE void wait(Index at) const { ptx::mbarrier_wait(full(at.stage), at.parity); }
    // One lane of every warp that init() was told to count.
    FA_DEVICE void release(Index at) const { ptx::mbarrier_arrive(empty(at.stage)); }
};

}  // namespace flash_attn
