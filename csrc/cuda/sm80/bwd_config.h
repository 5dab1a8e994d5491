// Tile shapes of the backward pass for compute capability 8.0 and later, shared by its three kernels.
#pragma once
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_rows.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

// How the warps of a block divide a tile: kRowWarps times kColWarps rectangles.
template <int kRows_, int kCols_, int kWarps, int kRowWarps> struct WarpGrid {
    static constexpr int kColWarps = kWarps / kRowWarps;
    static constexpr int kRows = kRows_ / kRowWarps, kCols = kCols_ / kColWarps;
    static_assert(kWarps % kRowWarps == 0 && kRows % 16 == 0 && kCols % 16 == 0);
    using Acc = AccTile<kRows, kCols>;

    FA_DEVICE static int row0() { return warp_id() / kColWarps * kRows; }
    FA_DEVICE static int col0() { return warp_id() % kColWarps * kCols; }
};

// RowWarps: how many of the warps lie above each other in S and dP, in dK and dV, and in dQ. dQ is computed in kDqParts
// parts of its columns, one after the other, where its accumulators would not fit beside those of dK and dV.
template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps, int kRowWarpsS, int kRowWarpsDkv,
          int kRowWarpsDq, int kDqParts_>
struct BwdConfigSm80 {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kBlockN = kBlockN_;
    static constexpr int kThreads = kWarps * kWarpThreads;
    using GridS = WarpGrid<kBlockM, kBlockN, kWarps, kRowWarpsS>;       // queries x keys
    using GridDkv = WarpGrid<kBlockN, kHeadDim, kWarps, kRowWarpsDkv>;  // keys x head_dim
    static constexpr int kDqParts = kDqParts_, kDqPartCols = kHeadDim / kDqParts;
    using GridDq = WarpGrid<kBlockM, kDqPartCols, kWarps, kRowWarpsDq>;  // queries x a part of head_dim
    FA_DEVICE static int dq_col0(int part) { return part * kDqPartCols + GridDq::col0(); }
    static constexpr int kDqTileElements = kBlockM * kHeadDim, kDqTurns = 1;
    // Element j of row block i of a part, within a tile of dQ: one element of all threads, then the next.
    FA_DEVICE static int dq_thread() { return ptx::thread_idx(); }
    FA_DEVICE static constexpr int dq_element(int part, int i, int j) {
        return part * kBlockM * kDqPartCols + (i * GridDq::Acc::kPerBlock + j) * kThreads;
    }

    using TileQ = SmemTile<kBlockM, kHeadDim>;
    using TileK = SmemTile<kBlockN, kHeadDim>;
    using TileS = SmemTile<kBlockM, kBlockN>;
    using Rows = SmemRows<kBlockM>;
    static constexpr int kSmemBytes = 2 * (TileQ::kBytes + TileK::kBytes + TileS::kBytes + Rows::kBytes);
    using TileOut = TileQ;
    static constexpr int kPreprocessThreads = kBlockM / 16 * kWarpThreads, kPreprocessSmemBytes = 2 * TileOut::kBytes;
    static constexpr int kPostprocessThreads = kThreads, kDqVector = 1;
    static constexpr bool kPadsRows = false, kDpByWgmma = false, kOverlap = false;
};

}  // namespace flash_attn
