// NaN and infinity in tiles that TMA has written and wgmma is to read (see tile/nonfinite.h): threads that have nothing
// else to do look for them, and leave zeros in their place, before the products are issued. What they were, those who
// need it read in global memory.
#pragma once
#include "ptx/global.h"
#include "tile/nonfinite.h"

namespace flash_attn {

// One of kThreads threads: replaces what is not finite in its share of the tile. Returns whether there was any.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE bool clear_nonfinite_share(SmemTile<kRows, kCols, 64> tile, int thread) {
    bool found = false;
#pragma unroll 1
    for (int byte = thread * 16; byte < tile.kBytes; byte += kThreads * 16) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, tile.base + byte);
        bool here = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) here |= ptx::any_nonfinite<Element>(chunk[i]);
        if (!here) continue;
        found = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk[i] = nonfinite_to_zero<Element>(chunk[i]);
        ptx::store_shared_16(tile.base + byte, chunk);
    }
    return found;
}

// The same without replacing.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE bool holds_nonfinite_share(SmemTile<kRows, kCols, 64> tile, int thread) {
    bool found = false;
#pragma unroll 1
    for (int byte = thread * 16; byte < tile.kBytes; byte += kThreads * 16) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, tile.base + byte);
#pragma unroll
        for (int i = 0; i < 4; ++i) found |= ptx::any_nonfinite<Element>(chunk[i]);
    }
    return found;
}

// c[r, column] += what is not finite in row k of b, for every k below K with attends(r, k). b: in global memory; its
// rows and columns past the valid ones hold nothing. Slow, and hardly ever run.
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
        c.for_each([&](int r, int column, float& x) {
            if (!attending[r] || column >= columns) return;
            const uint32_t bits = ptx::load(row + column).bits;
            if (ptx::any_nonfinite<Element>(bits)) x += ptx::unpack_lo<Element>(bits);
        });
    }
}

}  // namespace flash_attn
