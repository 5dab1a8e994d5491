// Tile copies from global to shared memory with cp.async; each thread copies the same chunks of every tile of a shape.
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/smem_tile.h"
#include "policy/host_device.h"

namespace flash_attn {

// Row pointers at a fixed stride.
template <class Element> struct StridedRows {
    const Element* first;
    int64_t row_stride;
};

// The share of one of kThreads threads in a tile, in 16-byte chunks: adjacent threads take adjacent chunks of a row
// (coalesced), and the block covers the rows of one panel, or of several at once, in as few steps as possible.
template <int kThreads, class Tile> class TileCopy;
template <int kThreads, int kRows, int kCols, int kPanelCols>
class TileCopy<kThreads, SmemTile<kRows, kCols, kPanelCols>> {
    using Tile = SmemTile<kRows, kCols, kPanelCols>;
    static constexpr int kThreadRows = kThreads / Tile::kPanelChunks;
    static constexpr int kPassRows = min(kThreadRows, kRows), kPassPanels = kThreadRows / kPassRows;
    static_assert(kPassRows % 8 == 0 && kRows % kPassRows == 0, "a thread's chunk keeps its place in every pass");
    static_assert(kThreadRows % kPassRows == 0 && Tile::kPanels % kPassPanels == 0);

public:
    FA_DEVICE explicit TileCopy(Tile tile, int thread = ptx::thread_idx())
        : row_(thread / Tile::kPanelChunks % kPassRows),
          panel_(thread / (Tile::kPanelChunks * kPassRows) % kPassPanels),
          column_(panel_ * Tile::kPanelCols + thread % Tile::kPanelChunks * 8),
          to_(Tile{tile.base + Tile::panel_offset(panel_)}.chunk(row_, thread % Tile::kPanelChunks)) {}

    // Starts copying the tile. Rows from valid_rows on and columns from valid_cols on are zero-filled. The caller
    // commits.
    template <class Element>
    FA_DEVICE void load(const StridedRows<Element>& rows, int valid_rows, int valid_cols) const {
        const Element* from = rows.first + row_ * rows.row_stride;
#pragma unroll
        for (int r = 0; r < kRows; r += kPassRows) {
            load_row(r, row_ + r < valid_rows ? from : nullptr, rows.first, valid_cols);
            from += kPassRows * rows.row_stride;
        }
    }
    // As load(), for row pointers row(0), row(1), ...; a null pointer is a row of zeros. `good`: any readable address.
    template <class Element, class FindRow>
    FA_DEVICE void load_found(const Element* good, FindRow row, int valid_rows, int valid_cols) const {
#pragma unroll 1
        for (int r = 0; r < kRows; r += kPassRows)
            load_row(r, row_ + r < valid_rows ? row(row_ + r) : nullptr, good, valid_cols);
    }
    // Calls f(address) for every chunk of this thread.
    template <class F> FA_DEVICE void for_each_chunk(F f) const {
#pragma unroll
        for (int r = 0; r < kRows; r += kPassRows)
#pragma unroll
            for (int panel = 0; panel < Tile::kPanels; panel += kPassPanels)
                f(to_ + Tile::row_offset(r) + Tile::panel_offset(panel));
    }

private:
    template <class Element>
    FA_DEVICE void load_row(int r, const Element* from, const Element* good, int valid_cols) const {
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; panel += kPassPanels) {
            const int column = panel * Tile::kPanelCols + column_;
            const int bytes = from ? clamp(2 * (valid_cols - column), 0, 16) : 0;
            // cp.async needs a valid address even if it reads no bytes.
            const Element* const source = bytes > 0 ? from + column : good;
            ptx::cp_async_16(to_ + Tile::row_offset(r) + Tile::panel_offset(panel), source, bytes);
        }
    }

    int row_, panel_, column_;
    ptx::SmemPtr to_;
};

template <int kThreads, class Tile, class Element>
FA_DEVICE void load_tile(Tile tile, const StridedRows<Element>& rows, int valid_rows, int valid_cols) {
    TileCopy<kThreads, Tile>(tile).load(rows, valid_rows, valid_cols);
}

}  // namespace flash_attn
