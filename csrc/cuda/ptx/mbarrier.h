// sm_90. mbarriers: barriers in shared memory that count arrivals and transferred bytes; a phase completes when no
// arrivals and no bytes are pending. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

constexpr int kMbarrierBytes = 8;  // 8-byte aligned in shared memory

FA_DEVICE void mbarrier_init(SmemPtr bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar.address), "r"(arrivals) : "memory");
}

// Makes this thread's mbarrier_init visible to the async proxy; other threads need a block barrier.
FA_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FA_DEVICE void mbarrier_arrive(SmemPtr bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar.address) : "memory");
}

// Arrives, and adds bytes to the bytes expected in this phase.
FA_DEVICE void mbarrier_arrive_expect_tx(SmemPtr bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar.address), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has completed. On a new barrier, parity 1 returns at once.
FA_DEVICE void mbarrier_wait(SmemPtr bar, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}" ::
            "r"(bar.address),
        "r"(parity)
        : "memory");
}

}  // namespace flash_attn::ptx
