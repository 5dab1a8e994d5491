// Asynchronous copies from global to shared memory, tracked per thread in commit groups.
// PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy: cp.async".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// Copies valid_bytes and zero-fills the rest of the 16 bytes. Both addresses are 16-byte aligned, and global_src must
// be inside the tensor even if valid_bytes is 0. Bypasses L1 (.cg): a block reads each tile once.
FA_DEVICE void cp_async_16(SmemPtr smem_dst, const void* global_src, int valid_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_dst.address), "l"(global_src),
                 "r"(valid_bytes)
                 : "memory");
}

// As cp_async_16 for 4 bytes, with 4-byte alignment. Through L1 (.ca): .cg exists for 16 bytes only.
FA_DEVICE void cp_async_4(SmemPtr smem_dst, const void* global_src, int valid_bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_dst.address), "l"(global_src),
                 "r"(valid_bytes)
                 : "memory");
}

// Closes the commit group of this thread's copies since the last commit. The group may be empty.
FA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are in flight. Other threads also need a block barrier.
template <int kPending> FA_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash_attn::ptx
