// NaN and infinity in V in the forward pass. A weight of 0 does not hide them: zero times NaN is NaN. Searching all of
// V cost 2 to 7% on an H200, so the output is searched instead: a tile whose output is nonfinite and whose mask hides a
// pair is put on a list, and the block recomputes the tiles of its list at the end, with nonfinite V zeroed before the
// products (cuda/tile/scan.h).
#pragma once
#include "cuda/attention/softmax.h"
#include "cuda/ptx/global.h"
#include "cuda/tile/gemm_sm90.h"
#include "cuda/tile/scan.h"
#include "policy/tile_order.h"

namespace flash_attn {

// A block's list of tiles to be repeated, linked through an array in global memory with one entry per 64 queries of a
// head. A tile uses the entry of its first queries.
struct FwdRepeat {
    int32_t index;  // of the tile in TileOrder; less than that of the previous entry
    int32_t next;   // place of the next entry; kNone at the end
};
struct FwdRepeats {
    static constexpr int32_t kNone = -1;
    FwdRepeat* places;
    int32_t num_places;

    // Entry of the query tile that starts at m0.
    FA_DEVICE static int32_t place(const Problem& p, int batch, int head, int64_t first_row_q, int m0) {
        return static_cast<int32_t>(head * num_query_tiles(p, kWarpgroupRows) +
                                    first_query_tile(p, kWarpgroupRows, batch, first_row_q) + m0 / kWarpgroupRows);
    }
    // head: word in shared memory with the place of the first entry.
    FA_DEVICE void put(ptx::SmemPtr head, int32_t place, int32_t index) const {
        ptx::store(&places[place].index, index);
        ptx::store(&places[place].next, static_cast<int32_t>(ptx::load_shared(head)));
        ptx::store_shared(head, uint32_t(place));
    }
    // Removes and returns the first tile, or kNone. limit: valid indices are less. With invalid lengths, two sequences
    // may share an entry, which may then belong to another block, be half-written, or link back: the index check then
    // ends the list.
    FA_DEVICE int32_t take(ptx::SmemPtr head, int32_t limit) const {
        const auto place = static_cast<int32_t>(ptx::load_shared(head));
        if (place < 0 || place >= num_places) return kNone;
        const int32_t index = ptx::load(&places[place].index);
        ptx::store_shared(head, uint32_t(ptx::load(&places[place].next)));
        return index >= 0 && index < limit ? index : kNone;
    }
};

// For the four lanes that share row lane / 4 of the output: whether it holds NaN or infinity. One row is enough: a
// nonfinite V spreads to every row of a tile.
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
