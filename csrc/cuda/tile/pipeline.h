// A ring of stages in shared memory: one producer thread fills them by TMA, several warps consume them.
#pragma once
#include "cuda/ptx/mbarrier.h"
#include "cuda/tile/lane.h"

namespace flash_attn {

// The next stage, and the phase parity of its barriers. Each thread that uses a pipeline keeps its own.
template <int kStages> struct StageIndex {
    int stage = 0, parity = 0;

    FA_DEVICE void advance() {
        const bool wraps = stage + 1 == kStages;
        stage = wraps ? 0 : stage + 1;
        parity ^= int(wraps);
    }
};

// Two mbarriers per stage: `full` completes when the bytes have landed, `empty` when all warps have released it.
template <int kStages_> struct Pipeline {
    static constexpr int kStages = kStages_, kBytes = 2 * kStages * ptx::kMbarrierBytes;
    using Index = StageIndex<kStages>;
    ptx::SmemPtr base;

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }
    FA_DEVICE ptx::SmemPtr full(int stage) const { return base + stage * ptx::kMbarrierBytes; }
    FA_DEVICE ptx::SmemPtr empty(int stage) const { return base + (kStages + stage) * ptx::kMbarrierBytes; }

    // Called by one thread; a block barrier makes the barriers visible to the others.
    FA_DEVICE void init(int releases) const {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(full(stage), 1);
            ptx::mbarrier_init(empty(stage), releases);
        }
    }
    // Producer: waits until the stage is free. Initially all stages are.
    FA_DEVICE void wait_until_free(Index at) const { ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1); }
    // Producer: waits until the stage is free, and announces the bytes. Returns the mbarrier for the copies.
    FA_DEVICE ptx::SmemPtr acquire(Index at, int bytes) const {
        wait_until_free(at);
        ptx::mbarrier_arrive_expect_tx(full(at.stage), bytes);
        return full(at.stage);
    }
    // Every thread that reads the stage: waits until it is filled.
    FA_DEVICE void wait(Index at) const { ptx::mbarrier_wait(full(at.stage), at.parity); }
    // One lane of each consumer warp, as counted in init(): frees the stage.
    FA_DEVICE void release(Index at) const { ptx::mbarrier_arrive(empty(at.stage)); }
};

}  // namespace flash_attn
