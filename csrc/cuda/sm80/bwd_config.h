// Compile-time configuration of the backward pass for compute capability 8.0 and later, from one tile shape.
#pragma once
#include "cuda/sm80/config.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_plan.h"
#include "cuda/tile/smem_rows.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

// Partition of a tile among the warps of a block: kRowWarps x kColWarps rectangles.
template <int kRows_, int kCols_, int kWarps, int kRowWarps> struct WarpGrid {
    static constexpr int kColWarps = kWarps / kRowWarps;
    static constexpr int kRows = kRows_ / kRowWarps, kCols = kCols_ / kColWarps;
    static_assert(kWarps % kRowWarps == 0 && kRows % 16 == 0 && kCols % 16 == 0);
    using Acc = AccTile<kRows, kCols>;

    FA_DEVICE static int row0() { return warp_id() / kColWarps * kRows; }
    FA_DEVICE static int col0() { return warp_id() % kColWarps * kCols; }
};

template <class Element_, BwdShapeSm80 kShape> struct BwdConfigSm80 {
    using Element = Element_;
    static constexpr int kHeadDim = kShape.head_dim, kBlockM = kShape.block_m, kBlockN = kShape.block_n;
    static constexpr int kWarps = kShape.warps, kThreads = kWarps * kWarpThreads;
    using GridS = WarpGrid<kBlockM, kBlockN, kWarps, kShape.rows_s>;       // queries x keys
    using GridDkv = WarpGrid<kBlockN, kHeadDim, kWarps, kShape.rows_dkv>;  // keys x head_dim
    static constexpr int kDqParts = kShape.dq_parts, kDqPartCols = kHeadDim / kDqParts;
    using GridDq = WarpGrid<kBlockM, kDqPartCols, kWarps, kShape.rows_dq>;  // queries x a part of head_dim
    FA_DEVICE static int dq_col0(int part) { return part * kDqPartCols + GridDq::col0(); }
    static constexpr cuda::WorkspaceShape kWorkspace = workspace_shape(kShape);
    static constexpr int kDqTileElements = kWorkspace.tile_elements, kDqTurns = kWorkspace.turns;
    // Offset in a dQ tile of element j of row block i of a part: consecutive threads are consecutive.
    FA_DEVICE static int dq_thread() { return ptx::thread_idx(); }
    FA_DEVICE static constexpr int dq_element(int part, int i, int j) {
        return part * kBlockM * kDqPartCols + (i * GridDq::Acc::kPerBlock + j) * kThreads;
    }

    using TileQ = SmemTile<kBlockM, kHeadDim>;
    using TileK = SmemTile<kBlockN, kHeadDim>;
    using TileS = SmemTile<kBlockM, kBlockN>;
    using Rows = SmemRows<kBlockM>;
    struct Smem {
        Place<TileK> k, v;
        Place<TileQ> q, dout;
        Place<TileS> p, ds;
        Place<Rows> lse, dsoftmax_sum;
    };
    static_assert(are_multiples_of<TileK::kAlignment>(offsetof(Smem, v), offsetof(Smem, q), offsetof(Smem, dout)) &&
                  are_multiples_of<TileS::kAlignment>(offsetof(Smem, p), offsetof(Smem, ds)) &&
                  are_multiples_of<16>(offsetof(Smem, lse), offsetof(Smem, dsoftmax_sum)));
    static constexpr int kSmemBytes = sizeof(Smem);
    static_assert(kSmemBytes <= (kShape.large_smem ? kLargeSmemBytes : kSmallSmemBytes));

    using TileOut = TileQ;
    static constexpr int kPreprocessThreads = kBlockM / 16 * kWarpThreads;
    struct PreprocessSmem { Place<TileOut> out, dout; };
    static constexpr int kPostprocessThreads = kThreads, kDqVector = 1;
    static constexpr bool kPadsRows = false, kDpByWgmma = false, kOverlap = false;
};

}  // namespace flash_attn
