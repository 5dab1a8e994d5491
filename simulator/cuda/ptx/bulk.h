// Host model of csrc/cuda/ptx/bulk.h.
#pragma once
#include "cuda/ptx/mbarrier.h"

namespace flash_attn::ptx {

FA_DEVICE void bulk_load(void* smem_dst, const void* global_src, int bytes, void* bar) {
    sim::bulk_load(smem_dst, global_src, bytes, static_cast<uint64_t*>(bar));
}
FA_DEVICE void bulk_reduce_add(float* global_dst, const void* smem_src, int bytes) {
    sim::bulk_reduce_add(global_dst, static_cast<const float*>(smem_src), bytes);
}
FA_DEVICE void bulk_commit() { sim::bulk_commit(); }
template <int kPending> FA_DEVICE void bulk_wait_read() { sim::bulk_wait(kPending, true); }
template <int kPending> FA_DEVICE void bulk_wait() { sim::bulk_wait(kPending, false); }

}  // namespace flash_attn::ptx
