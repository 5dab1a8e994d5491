// TMA copies of rows of one head of one sequence, between global and shared memory.
//
// A tensor map knows the bounds of a tensor, not those of a sequence in it. But rows past the end of a sequence must be
// zero-filled on load and not written on store. So the map has four overlapping dimensions:
//
//   columns  head_dim, contiguous.
//   rows     2^30, with the row stride. The last row of a sequence has the largest index: row r has index
//            2^30 - seqlen + r, so rows past the end are out of bounds.
//   turns    Stride 2^34 bytes minus one row stride. Index 2^30 adds 2^64 bytes, 0 in 64-bit addresses, minus the 2^30
//            row strides added above.
//   steps    Stride: the gcd of all strides, in bytes. Its index addresses the row after the last of the sequence.
//
// The sum is the address of row r. Triton uses the same arithmetic (python/triton/tools/ragged_tma.py).
#pragma once
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/tma.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/smem_tile.h"

namespace flash_attn {

// A kernel parameter. Strides in units of steps.
struct TmaTensor {
    ptx::TensorMap map;
    int32_t batch_steps, head_steps, row_steps;
};

// One warp: stores 16 rows of a register tile to rows row0 .. row0 + 16 of a shared tile.
template <class Element, int K, int kRows, int kCols>
FA_DEVICE void store_matrices(const PackedTile<Element, 16, K>& rows, SmemTile<kRows, kCols, 64> tile, int row0) {
    static_assert(K <= kCols);
    const ptx::SmemPtr chunk = tile.chunk(row0 + lane_id() % 16, lane_id() / 16);
#pragma unroll
    for (int i = 0; i < K / 16; ++i)
        ptx::stmatrix_x4<false>(ptx::flip_bits(chunk, i % 4 * 32) + tile.panel_offset(i / 4), rows.a[0][i]);
}

// One warpgroup: stores the transpose of its 64 rows; each warp writes 16 columns of the panel.
template <class Element, int K>
FA_DEVICE void store_matrices_transposed(const PackedTile<Element, 16, K>& rows, SmemTile<K, 64, 64> panel) {
    const uint32_t thread = fresh_thread_idx(), lane = thread % kWarpThreads;
    const uint32_t column = thread / kWarpThreads % 4 * 2 + lane / 8 % 2;  // in groups of 8 columns
    const ptx::SmemPtr chunk = panel.chunk(int(lane % 8 + lane / 16 * 8), int(column));
#pragma unroll
    for (int i = 0; i < K / 16; ++i) ptx::stmatrix_x4<true>(chunk + panel.row_offset(16 * i), rows.a[0][i]);
}

constexpr int kTmaRank = 4;
constexpr int32_t kTmaRows = 1 << 30, kTmaWrap = 1 << 30;

class TmaRows {
public:
    // first_row: first row of the sequence, relative to the batch entry or the packed tensor.
    FA_DEVICE TmaRows(const TmaTensor& t, int batch, int head, int64_t first_row, int seqlen)
        : map_(t.map), row0_(kTmaRows - seqlen), step_(static_cast<int32_t>((first_row + seqlen) * t.row_steps) +
                                                       batch * t.batch_steps + head * t.head_steps) {}

    // One thread: starts loading the rows from `row` on, one box per panel. The bytes count towards mbarrier `bar`.
    template <int kRows, int kCols>
    FA_DEVICE void load(SmemTile<kRows, kCols, 64> tile, ptx::SmemPtr bar, int row) const {
#pragma unroll
        for (int i = 0; i < tile.kPanels; ++i)
            ptx::tma_load<kTmaRank>(tile.panel(i).base, map_, bar, {64 * i, row0_ + row, kTmaWrap, step_});
    }
    // One thread: prefetches the same rows into the L2 cache.
    template <class Tile> FA_DEVICE void prefetch(int row) const {
#pragma unroll
        for (int i = 0; i < Tile::kPanels; ++i) ptx::tma_prefetch(map_, {64 * i, row0_ + row, kTmaWrap, step_});
    }
    // One thread: starts storing the tile's rows from tile_row on to the rows from `row` on; the box of the map gives
    // their number. The caller commits.
    template <int kRows, int kCols> FA_DEVICE void store(SmemTile<kRows, kCols, 64> tile, int tile_row, int row) const {
#pragma unroll
        for (int i = 0; i < tile.kPanels; ++i) store_panel(tile, i, tile_row, row);
    }
    template <int kRows, int kCols>
    FA_DEVICE void store_panel(SmemTile<kRows, kCols, 64> tile, int panel, int tile_row, int row) const {
        ptx::tma_store<kTmaRank>(map_, tile.panel(panel).base + tile.row_offset(tile_row),
                                 {64 * panel, row0_ + row, kTmaWrap, step_});
    }

private:
    const ptx::TensorMap& map_;
    int row0_, step_;
};

}  // namespace flash_attn
