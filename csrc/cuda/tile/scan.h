// NaN and infinity in tiles loaded by TMA and read by wgmma (see cuda/tile/nonfinite.h): scan warps search tiles, and
// nonfinite values are zeroed before the products. Their contribution is added from global memory.
#pragma once
#include "cuda/ptx/global.h"
#include "cuda/tile/nonfinite.h"

namespace flash_attn {

// For one of kThreads threads: whether its 16-byte chunks of the tile hold NaN or infinity. Several chunks are in
// flight at a time, as many as fit into the registers of scan warps.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE bool holds_nonfinite_share(SmemTile<kRows, kCols, 64> tile, int thread) {
    constexpr int kStep = kThreads * 16, kRounds = tile.kBytes / kStep;
    uint32_t marks[2] = {};
    const auto look = [&](ptx::SmemPtr at) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, at);
#pragma unroll
        for (int i = 0; i < 4; ++i) marks[i % 2] = ptx::mark_nonfinite<Element>(marks[i % 2], chunk[i]);
    };
    ptx::SmemPtr at = tile.base + thread * 16;
#pragma unroll 4
    for (int round = 0; round < kRounds; ++round, at = at + kStep) look(at);
    if (kRounds * kStep + thread * 16 < tile.kBytes) look(at);
    return ptx::any_nonfinite<Element>(marks[0]) || ptx::any_nonfinite<Element>(marks[1]);
}
// Zeroes NaN and infinity in this thread's chunks.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE void clear_nonfinite_share(SmemTile<kRows, kCols, 64> tile, int thread) {
#pragma unroll 1
    for (int byte = thread * 16; byte < tile.kBytes; byte += kThreads * 16) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, tile.base + byte);
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk[i] = nonfinite_to_zero<Element>(chunk[i]);
        ptx::store_shared_16(tile.base + byte, chunk);
    }
}

// c[r, column] += the nonfinite values of row k of b, for every k with attends(r, k). b: in global memory, with
// valid_rows rows and valid columns. Slow, and rarely run. Results that are already NaN are skipped, which bounds the
// time if all inputs are NaN, as in a diverged training.
template <class Element, int kRows, int kCols, class Attends>
FA_DEVICE void add_nonfinite_rows(AccTile<kRows, kCols>& c, const Element* b, int64_t row_stride, int valid_rows,
                                  int valid_cols, Attends attends) {
#pragma unroll 1
    for (int k = 0; k < valid_rows; ++k) {
        bool attending[c.kLaneRows];
#pragma unroll
        for (int r = 0; r < c.kLaneRows; ++r) attending[r] = attends(r, k);
        const Element* const row = ptx::opaque(b + k * row_stride);
        const int columns = ptx::opaque(valid_cols);
        bool changes = false;
        c.for_each([&](int r, int column, float& x) { changes |= attending[r] && column < columns && x == x; });
        if (!changes) continue;
        c.for_each([&](int r, int column, float& x) {
            if (!attending[r] || column >= columns) return;
            const uint32_t bits = ptx::load(row + column).bits;
            if (ptx::any_nonfinite<Element>(bits)) x += ptx::unpack_lo<Element>(bits);
        });
    }
}

// The transpose: c[r, column] += the nonfinite values b[k, r], for every k with attends(k, column).
template <class Element, int kRows, int kCols, class Attends>
FA_DEVICE void add_nonfinite_columns(AccTile<kRows, kCols>& c, const Element* b, int64_t row_stride, int valid_rows,
                                     int valid_cols, Attends attends) {
#pragma unroll 1
    for (int k = 0; k < valid_rows; ++k) {
        float found[c.kLaneRows] = {};
#pragma unroll
        for (int r = 0; r < c.kLaneRows; ++r) {
            if (lane_row(r) >= valid_cols) continue;
            const uint32_t bits = ptx::load(b + k * row_stride + lane_row(r)).bits;
            if (ptx::any_nonfinite<Element>(bits)) found[r] = ptx::unpack_lo<Element>(bits);
        }
        const int row = ptx::opaque(k);
        c.for_each([&](int r, int column, float& x) {
            if (found[r] != 0.f && attends(row, column)) x += found[r];
        });
    }
}

}  // namespace flash_attn
