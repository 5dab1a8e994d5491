"""Mutants that change nothing, by file and label, each with the proof."""

MASKED = "a tile that needs no mask is masked all the same: the mask hides nothing there, and costs time"
SEARCHED = "tiles are searched for NaN and infinity where they do no harm: none is found, or it is added here"
SLOW_PATH = (
    "finite tiles take the path of those that are not: nothing is added, nothing is cleared; where an infinity is seen "
    "by every query, it is added by this path instead of the product"
)
CLEARED = "what is finite is written back as it was"
NOTHING_DROPPED = "no random number is below a threshold of 0: nothing is dropped, and weights have no sign to clear"
HINT = "a hint for the cache changes no result"
EARLIER = "the next kernel may begin earlier: it waits for the end of this one either way"
NOT_READ_COUNTERS = "counters of turns are read only where sums are made in a fixed order"
EVERYONE_WAITS = "others wait for the turn too, or instead: the barrier that follows makes all threads wait for it"
NOT_READ = "no query attends keys past the end, and what no query attends is not read"
COMPILER_BARRIER = "this wait only restrains the compiler: what it waits for is waited for again before it is used"
NOT_FUSED = (
    "mutants are compiled without fused products and sums, so that the exponent is 0 either way; optimised builds "
    "detect it in rows of many tiles"
)
INVALID_LENGTHS = (
    "a list has an entry of another block, or half of one, only where lengths are invalid and two sequences share a "
    "place: valid lengths never come here, and for invalid ones every result is right"
)
ADDED_AGAIN = "an infinity or a NaN is added to a sum that has it already, which does not change it"
LATER_Q = "Q is asked for before dO then, as where dO has fewer stages"
ANY_MEMORY = "uninitialised memory is no place, or leads to a tile that is repeated needlessly, with the same result"
REFUSED = "where the two differ, kPassRows does not divide kRows, and the static_assert below it fails"
NO_SUCH_GRID = "TMA takes no tensor without rows, so no grid without tiles comes here"

SAME_IN_LANES = "the number is the same in all lanes, and its maximum with itself too"
PASSED_OVER = "more tiles of queries are asked: sees() is false of them, and they are passed over"
BOTH_RIGHT = "both formulas are right there"
LAST_ROW = "rows past the last one are as the last one, which is among them"

EQUIVALENT: dict[str, dict[str, str]] = {
    "cuda/attention/bwd_preprocess.h": {
        "removed: `ptx::grid_launch_dependents()`": EARLIER,
    },
    "cuda/attention/max_logits.h": {
        "`>` becomes `>=`: `a, float b) { return a > b || a != a ? a : b; }`": BOTH_RIGHT,
        "true: `lane_id() == 0`": SAME_IN_LANES,
        "`==` becomes `!=`: `head; if (lane_id() == 0) ptx::red_max(max_log`": SAME_IN_LANES,
    },
    "cuda/attention/range_blocks.h": {
        "`first + kRangeBlock` instead of `min(first + kRangeBlock, mask.window.seqlen_q)`": LAST_ROW,
        "false: `!mask.sees({row, row + kRangeTile}, {key, key + kRangeBlo...`": PASSED_OVER,
    },
    "cuda/attention/rows.h": {
        "false: `!p.paged_kv.block_table`": "kv_row_offset() finds rows without a table as well",
    },
    "cuda/attention/score_tile.h": {
        "`<` becomes `<=`: `; return square < 0.04f ? x * series : la`": BOTH_RIGHT,
        "false: `score.dropout.threshold == 0`": NOTHING_DROPPED,
        "false: `score.dropout.threshold == 0` [1]": NOTHING_DROPPED,
    },
    "cuda/attention/softmax.h": {
        "false: `rescale_factor[r] = rescale_factor[r] == row_max[r]`": NOT_FUSED,
        "`>` becomes `>=`: `t float rescale = above > 0.f ? ptx::exp2(-above)`": BOTH_RIGHT,
        "`>` becomes `>=`: `m[r] * rescale + (above > 0.f ? 1.f : ptx::exp2(a`": BOTH_RIGHT,
        "`>` becomes `>=`: `m); lse = above > 0.f ? fmaf(log_sum, flo`": BOTH_RIGHT,
        "true: `mask.template crosses<Edge::kAfter, At::kByKey>(queries, ...`": MASKED,
        "true: `mask.template crosses<Edge::kBefore, At::kByKey>(queries,...`": MASKED,
    },
    "cuda/sm80/bwd.h": {
        "true: `Variant::kMasked && !is_full`": SEARCHED,
        "true: `!k_searched`": "K is searched once more: it is the same",
        "true: `!is_full`": MASKED,
        "true: `Variant::kMasked && nonfinite`": SLOW_PATH,
        "true: `ptx::thread_idx() == 0`": EVERYONE_WAITS,
        "`==` becomes `!=`: `if (ptx::thread_idx() == 0) ptx:`": EVERYONE_WAITS,
        "`<` becomes `<=`: `) { while (head < end_head && !fresh_mask`": "past the last head, no tile is asked for",
        "true: `pass.deterministic` [1]": "turns are passed that no block waits for",
    },
    "cuda/sm80/fwd.h": {
        "`N` instead of `min(N, 32)`": "the same weights, more of them at a time: costs registers",
        "`32` instead of `min(N, 32)`": "no tile has fewer than 32 keys",
        "true: `Variant::kMasked && !is_full`": SEARCHED,
        "true: `!is_full`": MASKED,
        "true: `Variant::kMasked && nonfinite`": SLOW_PATH,
    },
    "cuda/sm90/bwd.h": {
        "removed: `ptx::grid_launch_dependents()`": EARLIER,
        "true: `next >= params.order.grid.num_blocks()`": HINT,
        "true: `tile.is_outside() || tile.tiles().empty()`": HINT,
        "false: `tile.is_outside() || tile.tiles().empty()`": HINT,
        "true: `!Config::kOwnsColumns`": HINT,
        "false: `!Config::kOwnsColumns`": HINT,
        "removed: `prefetch_next_block<Config, Variant>(params)`": HINT,
        "`<` becomes `<=`: `t = Config::kStagesDout < Config::kStagesQ || is_`": LATER_Q,
    },
    "cuda/sm90/bwd_columns.h": {
        "removed: `smem_.pipe_dout.wait(at_dout_)` [1]": COMPILER_BARRIER,
        "true: `!is_full`": MASKED,
        "true: `this->is_leader()`": EVERYONE_WAITS,
        "false: `!params_.common.pass.deterministic` [1]": NOT_READ_COUNTERS,
    },
    "cuda/sm90/bwd_consumer.h": {
        "false: `tile.is_full_block(m)`": ADDED_AGAIN,
        "`seq.seqlen_q - m * M` instead of `min(M, seq.seqlen_q - m * M)`": ADDED_AGAIN,
        "`N` instead of `min(N, tile.seq.seqlen_k - tile.n0)`": NOT_READ,
        "`tile.seq.seqlen_k - tile.n0` instead of `min(N, tile.seq.seqlen_k - tile.n0)`": ADDED_AGAIN,
        "true: `acc_dq.x[0][j] != 0.f`": "zeros are added",
    },
    "cuda/sm90/bwd_keys.h": {
        "true: `kBlockMasked || (!Variant::kMasked && !tile_.is_full_bloc...`": MASKED,
        "`==` becomes `!=`: `st bool adds_dq = stage == consumer_; if (`": "the consumers change places",
        "false: `!in_turn`": NOT_READ_COUNTERS,
    },
    "cuda/sm90/fwd.h": {
        "false: `Config::kOutApart` [2]": "where the output has a place of its own, no thread waits for it to leave",
        "true: `found`": CLEARED,
        "removed: `next_v.advance()`": COMPILER_BARRIER,
        "removed: `smem_.pipe_v.wait(next_v)`": COMPILER_BARRIER,
        "true: `Variant::Mask::kHasRanges`": BOTH_RIGHT,
        "true: `cleared`": ADDED_AGAIN,
        "true: `!tile.is_full_block(n)`": MASKED,
        "false: `tile.is_full_block(n)`": SLOW_PATH,
        "`N` instead of `min(N, tile.seq.seqlen_k - n * N)`": NOT_READ,
        "`tile.seq.seqlen_k - n * N` instead of `min(N, tile.seq.seqlen_k - n * N)`": ADDED_AGAIN,
    },
    "cuda/sm90/fwd_config.h": {
        "removed: `ptx::store_shared(repeats(), uint32_t(FwdRepeats::kNone))`": ANY_MEMORY,
    },
    "cuda/sm90/fwd_repeats.h": {
        "`>=` becomes `>`: `if (place < 0 || place >= num_places) return kNon`": INVALID_LENGTHS,
        "true: `index >= 0 && index < limit`": INVALID_LENGTHS,
        "`index < limit` becomes `true`": INVALID_LENGTHS,
        "`<` becomes `<=`: `urn index >= 0 && index < limit ? index : kNone;`": INVALID_LENGTHS,
    },
    "cuda/sm90/tile_queue.h": {
        "false: `taken`": "the division of tiles is fixed then: each is worked on once",
    },
    "cuda/tile/copy_sm80.h": {
        "`kThreadRows` instead of `min(kThreadRows, kRows)`": REFUSED,
    },
    "cuda/tile/store_rows.h": {
        "false: `in_pairs`": "pairs are stored one element at a time",
        "true: `!aligned || !kByEights`": "the same elements are stored in pairs",
    },
    "policy/tile_order.h": {
        "`grid.num_tiles` instead of `max(grid.num_tiles, 1)`": NO_SUCH_GRID,
    },
}
