// A tile of 16-bit elements in shared memory: panels of 64 columns, or of 32 if half of the tile is not whole panels of
// 64. Swizzle: the 16-byte chunks of a row are permuted by XOR with the row, so that the same chunk of eight rows,
// which is what ldmatrix reads at once, is in different banks.
#pragma once
#include "cuda/tile/lane.h"

namespace flash_attn {

template <int kRows, int kCols, int kPanelCols_ = kCols == 64 || kCols % 128 == 0 ? 64 : 32> struct SmemTile {
    static_assert(kRows % 16 == 0 && kCols % kPanelCols_ == 0);
    static constexpr int kPanelCols = kPanelCols_;
    static constexpr int kPanels = kCols / kPanelCols, kPanelChunks = kPanelCols / 8;
    static constexpr int kRowBytes = kPanelCols * 2, kPanelBytes = kRows * kRowBytes, kBytes = kPanels * kPanelBytes;
    static constexpr int kAlignment = kRowBytes;  // the swizzle flips address bits within a row
    ptx::SmemPtr base;

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }

    // An address is a per-thread part plus a compile-time offset. The swizzle repeats every 8 rows, so multiples of 8
    // rows and panels are added; chunks within a panel are flipped bits. This way one register serves a whole tile.
    FA_DEVICE static constexpr int row_offset(int rows) { return rows * kRowBytes; }
    FA_DEVICE static constexpr int panel_offset(int panel) { return panel * kPanelBytes; }
    // Address of chunk c of panel 0.
    FA_DEVICE ptx::SmemPtr chunk(int row, int c) const {
        // Two rows of 64 bytes cover all banks once.
        const int key = kPanelCols == 64 ? row % 8 : row / 2 % 4;
        return ptx::pin(base + (row_offset(row) + ((c ^ key) << 4)));
    }
    // Address of the 8 columns 8 c + 8 lane_half, within kWidth columns from col0, a multiple of kWidth. Either c is
    // even and a compile-time constant, or lane_half is zero.
    template <int kWidth> FA_DEVICE ptx::SmemPtr chunk_at(int row, int col0, int c, int lane_half) const {
        if constexpr (kPanelCols % kWidth == 0 || kWidth % kPanelCols == 0) {
            const SmemTile columns{base + panel_offset(col0 / kPanelCols)};
            const ptx::SmemPtr p = columns.chunk(row, col0 / 8 % kPanelChunks + lane_half);
            return ptx::flip_bits(p, c % kPanelChunks << 4) + panel_offset(c / kPanelChunks);
        } else {
            const int at = col0 / 8 + c;
            return ptx::flip_bits(chunk(row, lane_half), at % kPanelChunks << 4) + panel_offset(at / kPanelChunks);
        }
    }
    FA_DEVICE SmemTile<kRows, kPanelCols, kPanelCols> panel(int i) const { return {base + panel_offset(i)}; }
    // Address of the pair of elements that a lane holds of an accumulator of kWidth columns: row row0 + lane / 4, the
    // n-th group of 8 columns.
    template <int kWidth> FA_DEVICE ptx::SmemPtr lane_pair(int row0, int col0, int n) const {
        return chunk_at<kWidth>(row0 + lane_id() / 4, col0, n, 0) + lane_column() * 2;
    }
};

// Panels of 64 columns only: the layout that TMA writes with the 128-byte swizzle and wgmma reads.
template <int kRows, int kCols> using WideTile = SmemTile<kRows, (kCols + 63) / 64 * 64, 64>;
constexpr int kWideTileAlignment = 1024;

}  // namespace flash_attn
