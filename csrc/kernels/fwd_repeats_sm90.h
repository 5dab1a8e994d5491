// NaN and infinity in V, for the forward pass. Zero times NaN is NaN, so rows to which the mask hides such a value
// would not be spared by its weight of 0. To search all of V took 2 to 7% on an H200, so the output is looked at: where
// it is not finite and the mask hides something, the tile is remembered, and when a block has no others left, it
// computes those once more, with V searched and cleared (tile/inspect.h).
#pragma once
#include "attn/scheduler.h"
#include "ptx/global.h"
#include "tile/gemm_sm90.h"
#include "tile/inspect.h"

namespace flash_attn {

// Lists of tiles to be repeated, one for every consumer of a block, linked through global memory: 64 queries, which are
// those of one consumer, have a place there.
struct FwdRepeat {
    int32_t index;  // of a tile, in the order in which tiles are begun: less than that of the entry before
    int32_t next;   // place of the next entry, kNone after the last
};
struct FwdRepeats {
    static constexpr int32_t kNone = -1, kLimit = 0x7fffffff;  // above all indices
    FwdRepeat* places;

    // Of the rows from m0 on.
    FA_DEVICE static int32_t place(const Problem& p, int batch, int head, int64_t first_row_q, int m0) {
        return static_cast<int32_t>(head * num_query_tiles(p, kWarpgroupRows) +
                                    first_query_tile(p, kWarpgroupRows, batch, first_row_q) + m0 / kWarpgroupRows);
    }
    FA_DEVICE void put(int32_t place, const FwdRepeat& repeat) const {
        ptx::store(&places[place].index, repeat.index);
        ptx::store(&places[place].next, repeat.next);
    }
    FA_DEVICE FwdRepeat get(int32_t place) const {
        return {ptx::load(&places[place].index), ptx::load(&places[place].next)};
    }
    // Takes the tile of the greatest index below `limit` from all lists; kNone: there are no more. heads: in shared
    // memory, a word for every list. With lengths that lie, two sequences may share a place, and a list may lead back
    // to where it has been: that is its end.
    FA_DEVICE int32_t take(ptx::SmemPtr heads, int lists, int32_t limit) const {
        int32_t greatest = kNone;
        for (int i = 0; i < lists; ++i) {
            const auto head = static_cast<int32_t>(ptx::load_shared(heads + 4 * i));
            if (head == kNone) continue;
            const FwdRepeat first = get(head);
            if (first.index < limit)
                greatest = max(greatest, first.index);
            else
                ptx::store_shared(heads + 4 * i, uint32_t(kNone));
        }
        for (int i = 0; i < lists; ++i) {
            const auto head = static_cast<int32_t>(ptx::load_shared(heads + 4 * i));
            if (head == kNone) continue;
            const FwdRepeat first = get(head);
            if (first.index == greatest) ptx::store_shared(heads + 4 * i, uint32_t(first.next));
        }
        return greatest;
    }
};

// Whether a thread's part of an output holds anything that is not finite.
template <class Element, int kCols> FA_DEVICE bool holds_nonfinite(const PackedTile<Element, 16, kCols>& out) {
    uint32_t marks[4] = {};
#pragma unroll
    for (int i = 0; i < kCols / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) marks[j] = ptx::mark_nonfinite<Element>(marks[j], out.a[0][i][j]);
    bool any = false;
#pragma unroll
    for (const uint32_t mark : marks) any |= ptx::any_nonfinite<Element>(mark);
    return any;
}

}  // namespace flash_attn
