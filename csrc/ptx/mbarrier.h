// sm_90. Barriers in shared memory that count arrivals and delivered bytes; a phase completes when none of either is
// outstanding. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once
#include "ptx/types.h"

namespace flash_attn::ptx {

using Mbarrier = uint64_t;  // lives in shared memory, 8-byte aligned

FA_DEVICE void mbarrier_init(Mbarrier* bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(arrivals) : "memory");
}

// Makes barriers that this thread initialised visible to the asynchronous proxy; other threads need a block barrier.
FA_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FA_DEVICE void mbarrier_arrive(Mbarrier* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar)) : "memory");
}

// Arrives, and adds bytes to what this phase waits for.
FA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
                 : "memory");
}

// Returns once the phase of this parity has completed. On a fresh barrier, parity 1 returns at once.
FA_DEVICE void mbarrier_wait(Mbarrier* bar, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}" ::
            "r"(smem_address(bar)),
        "r"(parity)
        : "memory");
}

}  // namespace flash_attn::ptx
