// Parameters and tile coordinates of the backward pass for compute capability 9.0.
#pragma once
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/rows.h"
#include "cuda/sm90/bwd_config.h"
#include "policy/variant.h"

namespace flash_attn {

struct BwdKernelParamsSm90 {
    BwdKernelParams common;
    TmaTensor q, k, v, dout;  // boxes of kBlockM, kBlockN, kBlockN and kBlockM rows
    TmaTensor dk, dv;         // boxes of kOutRows rows; none for partial results
    TileOrder order;
    int heads_per_key_head;
    int blocks_at_a_time;  // number of SMs
};

// The key tile of a block, and the query tiles that see it, for each of the heads that share it.
template <class Config, class Variant> struct BwdTileSm90 {
    static_assert(kRangeTile % Config::kBlockM == 0);
    int n0, head_k, batch, first_head;
    Sequence seq;
    typename Variant::Mask mask;

    // Recomputed where it is needed outside the main loop, which has no registers to spare.
    FA_DEVICE explicit BwdTileSm90(const BwdKernelParamsSm90& params, int block = ptx::opaque(ptx::block_idx())) {
        const Problem& p = params.common.pass.problem;
        const WorkTile at = params.order.at(block);
        const int n = adds_backwards(params) ? at.tile : params.order.grid.num_tiles - 1 - at.tile;
        n0 = n * Config::kBlockN, head_k = at.head, batch = at.batch;
        first_head = head_k * params.heads_per_key_head;
        seq = sequence_at(p, batch);
        mask = Variant::Mask::of(p, seq, batch, first_head);
    }
    // The same tile, computed again at every use if its mask leaves no registers to keep what is rarely used.
    FA_DEVICE decltype(auto) fresh(const BwdKernelParamsSm90& params) const {
        if constexpr (Variant::Mask::kHasRanges)
            return BwdTileSm90(params);
        else
            return *this;
    }
    // Rows of this head of K and of tensors shaped like it.
    FA_DEVICE TmaRows key_rows(const TmaTensor& t) const {
        return TmaRows(t, batch, head_k, seq.first_row_k, seq.seqlen_k);
    }
    // Rows of one query head.
    FA_DEVICE TmaRows query_rows(const TmaTensor& t, int head) const {
        return TmaRows(t, batch, head, seq.first_row_q, seq.seqlen_q);
    }
    FA_DEVICE Range tiles() const { return tiles_of(mask.q_range(keys()), Config::kBlockM); }
    FA_DEVICE bool is_outside() const { return n0 >= seq.seqlen_k; }  // the grid is sized for the longest sequence
    FA_DEVICE Range keys() const { return {n0, n0 + Config::kBlockN}; }
    FA_DEVICE Range rows(int m) const { return {m * Config::kBlockM, (m + 1) * Config::kBlockM}; }
    FA_DEVICE bool sees(int m) const { return mask.sees(rows(m), keys()); }  // of the tiles: others are passed over
    FA_DEVICE bool is_full_block(int m) const { return mask.template is_full_block<true>(rows(m), keys()); }
    // Deterministic: the key tiles that a query tile sees add to its dQ in a fixed order. Ascending; under a mask
    // descending, so that causal query tiles start with the tile on the diagonal, which then need not wait.
    FA_DEVICE static bool adds_backwards(const BwdKernelParamsSm90& params) {
        return Variant::kMasked && params.common.pass.deterministic;
    }
    // Number of key tiles that add before this one. Their blocks have smaller indices and start earlier, so the wait
    // cannot deadlock.
    FA_DEVICE int turn(const BwdKernelParamsSm90& params, int m) const {
        const int n = n0 / Config::kBlockN;
        return adds_backwards(params) ? mask.kv_tiles(rows(m), Config::kBlockN).end - 1 - n : n;
    }
};

}  // namespace flash_attn
