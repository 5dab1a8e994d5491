// sm_90. Bulk copies of contiguous memory, issued by one thread. Addresses and sizes are multiples of 16 bytes. PTX
// ISA, "Asynchronous copy: Bulk copy: cp.async.bulk, cp.reduce.async.bulk".
#pragma once
#include "cuda/ptx/mbarrier.h"

namespace flash_attn::ptx {

// Global to shared memory; the bytes count towards the current phase of mbarrier `bar`.
FA_DEVICE void bulk_load(SmemPtr smem_dst, const void* global_src, int bytes, SmemPtr bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_dst.address),
                 "l"(global_src), "r"(bytes), "r"(bar.address)
                 : "memory");
}

// global_dst[i] += smem_src[i], each element atomically. Part of the current bulk group.
FA_DEVICE void bulk_reduce_add(float* global_dst, SmemPtr smem_src, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global_dst),
                 "r"(smem_src.address), "r"(bytes)
                 : "memory");
}

// Closes the bulk group of this thread's bulk and tensor stores since the last commit.
FA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the newest kPending groups have read their shared memory, which may then be overwritten.
template <int kPending> FA_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until all but the newest kPending groups have completed their writes to global memory.
template <int kPending> FA_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash_attn::ptx
