// Stores a register tile to shared memory as 16-bit elements.
#pragma once
#include "cuda/ptx/shared.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

// To rows and columns from (row0, col0) on. One store per pair: the same chunk of eight rows is in different banks.
template <class Element, int kRows, int kCols, int kTileRows, int kTileCols, int kPanelCols>
FA_DEVICE void store_shared(const AccTile<kRows, kCols>& t, SmemTile<kTileRows, kTileCols, kPanelCols> tile, int row0,
                            int col0) {
#pragma unroll
    for (int r = 0; r < t.kLaneRows; ++r)
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
            const float* const x = &t.x[r / 2][4 * n + r % 2 * 2];
            const ptx::SmemPtr pair = tile.template lane_pair<kCols>(row0, col0, n);
            ptx::store_shared(pair + tile.row_offset(r * 8), ptx::pack<Element>(x[0], x[1]));
        }
}

}  // namespace flash_attn
