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
    static constexpr int32_t kNone = -1;
    FwdRepeat* places;
    int32_t num_places;

    // Of the rows from m0 on.
    FA_DEVICE static int32_t place(const Problem& p, int batch, int head, int64_t first_row_q, int m0) {
        return static_cast<int32_t>(head * num_query_tiles(p, kWarpgroupRows) +
                                    first_query_tile(p, kWarpgroupRows, batch, first_row_q) + m0 / kWarpgroupRows);
    }
    FA_DEVICE void put(int32_t place, const FwdRepeat& repeat) const {
        ptx::store(&places[place].index, repeat.index);
        ptx::store(&places[place].next, repeat.next);
    }
    // Takes the tile of the greatest index below `limit` from all lists; kNone: there are no more. heads: in shared
    // memory, a word for every list.
    FA_DEVICE int32_t take(ptx::SmemPtr heads, int lists, int32_t limit) const {
        int32_t greatest = kNone;
        for (int i = 0; i < lists; ++i) greatest = max(greatest, get(heads + 4 * i, limit).index);
        for (int i = 0; i < lists; ++i) {
            const FwdRepeat first = get(heads + 4 * i, limit);
            if (first.index == greatest) ptx::store_shared(heads + 4 * i, uint32_t(first.next));
        }
        return greatest;
    }

private:
    // The first entry of a list; index kNone: there is none. With lengths that lie, two sequences may share a place.
    // What is found there may be of another block, half of it, or lead back to where the list has been: that is its end.
    FA_DEVICE FwdRepeat get(ptx::SmemPtr head, int32_t limit) const {
        const auto place = static_cast<int32_t>(ptx::load_shared(head));
        if (place < 0 || place >= num_places) return {kNone, kNone};
        const FwdRepeat first{ptx::load(&places[place].index), ptx::load(&places[place].next)};
        return first.index >= 0 && first.index < limit ? first : FwdRepeat{kNone, kNone};
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
