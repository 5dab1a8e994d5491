// Compile-time configuration of the forward pass for compute capability 8.0 and later, from one tile shape.
#pragma once
#include "cuda/sm80/config.h"
#include "cuda/tile/smem_plan.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

template <class Element_, FwdShapeSm80 kShape> struct FwdConfigSm80 {
    using Element = Element_;
    static constexpr int kHeadDim = kShape.head_dim, kBlockM = kShape.block_m, kBlockN = kShape.block_n;
    static constexpr int kThreads = kShape.warps * kWarpThreads, kWarpRows = kBlockM / kShape.warps;
    using TileQ = SmemTile<kBlockM, kHeadDim>;
    using TileK = SmemTile<kBlockN, kHeadDim>;

    struct Smem {
        Place<TileQ> q;
        Place<TileK> k, v;
    };
    static_assert(are_multiples_of<TileQ::kAlignment>(offsetof(Smem, k), offsetof(Smem, v)));
    static constexpr int kSmemBytes = sizeof(Smem);
    static_assert(kSmemBytes <= (kShape.large_smem ? kLargeSmemBytes : kSmallSmemBytes));
};

}  // namespace flash_attn
