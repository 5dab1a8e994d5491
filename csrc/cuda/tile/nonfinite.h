// NaN and infinity in the B operand of a product whose A operand is zero for hidden pairs. Zero times NaN is NaN, so
// the product would spread it to rows that do not see it. Instead, tiles in which the mask hides a pair are searched;
// nonfinite values are added to the rows that see them, and zeroed before the product.
#pragma once
#include "cuda/ptx/shared.h"
#include "cuda/tile/acc_tile.h"
#include "cuda/tile/copy_sm80.h"

namespace flash_attn {

// Whether this thread's share of the tile, once it has landed, holds NaN or infinity.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE bool holds_nonfinite(SmemTile<kRows, kCols> tile) {
    bool found = false;
    TileCopy<kThreads, SmemTile<kRows, kCols>>(tile).for_each_chunk([&](ptx::SmemPtr p) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) found |= ptx::any_nonfinite<Element>(chunk[i]);
    });
    return found;
}

template <class Element> FA_DEVICE uint32_t nonfinite_to_zero(uint32_t pair) {
    const uint32_t low = ptx::any_nonfinite<Element>(pair & 0xffffu) ? 0 : pair & 0xffffu;
    return low | (ptx::any_nonfinite<Element>(pair & 0xffff0000u) ? 0 : pair & 0xffff0000u);
}

// Zeroes NaN and infinity in this thread's share of the tile.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE void clear_nonfinite(SmemTile<kRows, kCols> tile) {
    TileCopy<kThreads, SmemTile<kRows, kCols>>(tile).for_each_chunk([&](ptx::SmemPtr p) {
        uint32_t chunk[4];
        ptx::load_shared_16(chunk, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk[i] = nonfinite_to_zero<Element>(chunk[i]);
        ptx::store_shared_16(p, chunk);
    });
}

// c[r, column] += the nonfinite values b[k, col0 + column], for every k with attends(r, k). Slow, and rarely run.
template <class Element, int kRows, int kCols, int K, int kColsB, class Attends>
FA_DEVICE void add_nonfinite(AccTile<kRows, kCols>& c, SmemTile<K, kColsB> b, int col0, Attends attends) {
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
        bool attending[c.kLaneRows];
#pragma unroll
        for (int r = 0; r < c.kLaneRows; ++r) attending[r] = attends(r, k);
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
            const uint32_t pair = ptx::load_shared(b.template chunk_at<kCols>(k, col0, n, 0) + lane_column() * 2);
            const float low = ptx::any_nonfinite<Element>(pair & 0xffffu) ? ptx::unpack_lo<Element>(pair) : 0.f;
            const float high = ptx::any_nonfinite<Element>(pair & 0xffff0000u) ? ptx::unpack_hi<Element>(pair) : 0.f;
#pragma unroll
            for (int r = 0; r < c.kLaneRows; ++r) {
                c.x[r / 2][4 * n + r % 2 * 2] += attending[r] ? low : 0.f;
                c.x[r / 2][4 * n + r % 2 * 2 + 1] += attending[r] ? high : 0.f;
            }
        }
    }
}

}  // namespace flash_attn
