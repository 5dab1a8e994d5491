// NaN and infinity in V, for the forward pass. Zero times NaN is NaN, so rows to which the mask hides such a value
// would not be spared by its weight of 0. To search all of V took 2 to 7% on an H200, so the output is looked at: where
// it is not finite and the mask hides something, the tile is remembered, and when a block has no others left, it
// computes those once more, with V searched and cleared (cuda/tile/scan.h).
#pragma once
#include "cuda/attention/softmax.h"
#include "cuda/ptx/global.h"
#include "cuda/tile/gemm_sm90.h"
#include "cuda/tile/scan.h"
#include "policy/tile_order.h"

namespace flash_attn {

// A block's list of tiles to be repeated, linked through global memory, where a tile has the place of its first 64
// queries.
struct FwdRepeat {
    int32_t index;  // of a tile, in the order in which tiles are begun: less than that of the entry before
    int32_t next;   // place of the next entry, kNone after the last
};
struct FwdRepeats {
    static constexpr int32_t kNone = -1;
    FwdRepeat* places;
    int32_t num_places;

    // Of the tile of queries from m0 on.
    FA_DEVICE static int32_t place(const Problem& p, int batch, int head, int64_t first_row_q, int m0) {
        return static_cast<int32_t>(head * num_query_tiles(p, kWarpgroupRows) +
                                    first_query_tile(p, kWarpgroupRows, batch, first_row_q) + m0 / kWarpgroupRows);
    }
    // head: a word in shared memory, the place of the list's first entry.
    FA_DEVICE void put(ptx::SmemPtr head, int32_t place, int32_t index) const {
        ptx::store(&places[place].index, index);
        ptx::store(&places[place].next, static_cast<int32_t>(ptx::load_shared(head)));
        ptx::store_shared(head, uint32_t(place));
    }
    // Takes the first tile; kNone: there is none. limit: indices are less than this. With invalid lengths, two
    // sequences may share a place. What is found there may be of another block, half of it, or lead back to where the
    // list has been: that is its end.
    FA_DEVICE int32_t take(ptx::SmemPtr head, int32_t limit) const {
        const auto place = static_cast<int32_t>(ptx::load_shared(head));
        if (place < 0 || place >= num_places) return kNone;
        const int32_t index = ptx::load(&places[place].index);
        ptx::store_shared(head, uint32_t(ptx::load(&places[place].next)));
        return index >= 0 && index < limit ? index : kNone;
    }
};

// Four lanes: whether the row of an output that they share, lane / 4, holds anything that is not finite. A value in V
// that is not finite shows in every row of a tile.
template <class Element, int kCols> FA_DEVICE bool row_holds_nonfinite(const PackedTile<Element, 16, kCols>& out) {
    uint32_t marks[2] = {};
#pragma unroll
    for (int i = 0; i < kCols / 16; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) marks[j] = ptx::mark_nonfinite<Element>(marks[j], out.a[0][i][2 * j]);
    const bool found = ptx::any_nonfinite<Element>(marks[0]) || ptx::any_nonfinite<Element>(marks[1]);
    return quad_max(found ? 1.f : 0.f) != 0.f;
}

}  // namespace flash_attn
