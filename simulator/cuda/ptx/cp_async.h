// Host model of csrc/cuda/ptx/cp_async.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE void cp_async_16(void* smem_dst, const void* global_src, int valid_bytes) {
    sim::cp_async(smem_dst, global_src, 16, valid_bytes);
}
FA_DEVICE void cp_async_4(void* smem_dst, const void* global_src, int valid_bytes) {
    sim::cp_async(smem_dst, global_src, 4, valid_bytes);
}
FA_DEVICE void cp_async_commit() { sim::cp_async_commit(); }
template <int kPending> FA_DEVICE void cp_async_wait() { sim::cp_async_wait(kPending); }

}  // namespace flash_attn::ptx
