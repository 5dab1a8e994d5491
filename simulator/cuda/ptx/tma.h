// Host model of csrc/cuda/ptx/tma.h.
#pragma once
#include "cuda/ptx/bulk.h"

namespace flash_attn::ptx {

using TensorMap = sim::TensorMap;

template <int kRank>
FA_DEVICE void tma_load(void* smem_dst, const TensorMap& map, void* bar, const int (&coord)[kRank]) {
    static_assert(kRank >= 2 && kRank <= 5);
    sim::tma_load(smem_dst, map, static_cast<uint64_t*>(bar), coord, kRank);
}
template <int kRank> FA_DEVICE void tma_store(const TensorMap& map, const void* smem_src, const int (&coord)[kRank]) {
    static_assert(kRank >= 2 && kRank <= 5);
    sim::tma_store(map, smem_src, coord, kRank);
}

FA_DEVICE void tma_prefetch(const TensorMap& map, const int (&coord)[4]) { sim::tma_prefetch(map, coord, 4); }

}  // namespace flash_attn::ptx
