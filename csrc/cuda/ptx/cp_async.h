// Asynchronous copies from global to shared memory, completed per thread in groups.
// PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy: cp.async".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// smem_dst[0, 16) = global_src[0, valid_bytes), then zeros. Both addresses are multiples of 16, and global_src is an
// address within the tensor even where valid_bytes is 0. Bypasses L1 (.cg): tiles are read once per block.
FA_DEVICE void cp_async_16(SmemPtr smem_dst, const void* global_src, int valid_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_dst.address), "l"(global_src),
                 "r"(valid_bytes)
                 : "memory");
}

// The same of 4 bytes; both addresses are multiples of 4. Through L1 (.ca), the only way for so few.
FA_DEVICE void cp_async_4(SmemPtr smem_dst, const void* global_src, int valid_bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_dst.address), "l"(global_src),
                 "r"(valid_bytes)
                 : "memory");
}

// Closes the group of the copies that this thread has issued since the last commit. It may be empty.
FA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are in flight. Others see its copies after a barrier.
template <int kPending> FA_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash_attn::ptx
