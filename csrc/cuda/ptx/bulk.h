// sm_90. Copies of contiguous memory that one thread issues. Addresses and sizes are multiples of 16 bytes.
// PTX ISA, "Asynchronous copy: Bulk copy: cp.async.bulk, cp.reduce.async.bulk".
#pragma once
#include "cuda/ptx/mbarrier.h"

namespace flash_attn::ptx {

// Global to shared memory; the bytes count towards the phase of bar.
FA_DEVICE void bulk_load(SmemPtr smem_dst, const void* global_src, int bytes, SmemPtr bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_dst.address),
                 "l"(global_src), "r"(bytes), "r"(bar.address)
                 : "memory");
}

// global_dst[i] += smem_src[i], each element atomically. Belongs to the current group of bulk stores.
FA_DEVICE void bulk_reduce_add(float* global_dst, SmemPtr smem_src, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global_dst),
                 "r"(smem_src.address), "r"(bytes)
                 : "memory");
}

// Closes the group of the bulk and tensor stores that this thread has issued since the last commit.
FA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when all but the newest kPending groups have read their shared memory, which may then be overwritten.
template <int kPending> FA_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Returns when all but the newest kPending groups have also been written to global memory.
template <int kPending> FA_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash_attn::ptx
