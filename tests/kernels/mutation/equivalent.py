"""Mutants that change nothing, each with the proof: (file, mutation, which of those alike in the file) -> why."""

SOFTMAX = "cuda/attention/softmax.h"
SCORES, FWD, BWD = "cuda/attention/score_tile.h", "cuda/sm80/fwd.h", "cuda/sm80/bwd.h"
FWD_HOPPER, BWD_HOPPER, CONSUMER = "cuda/sm90/fwd.h", "cuda/sm90/bwd.h", "cuda/sm90/bwd_consumer.h"
COLUMNS, KEYS = "cuda/sm90/bwd_columns.h", "cuda/sm90/bwd_keys.h"
REPEATS = "cuda/sm90/fwd_repeats.h"

MASKED_IN_VAIN = "a tile that needs no masking is masked all the same: the mask hides nothing there, and costs time"
SEARCHED_IN_VAIN = "tiles are searched for NaN and infinity where they do no harm: none is found, or it is added here"
SLOW_PATH = (
    "finite tiles take the path of those that are not: nothing is added, nothing is cleared; where an infinity is seen "
    "by every query, it is added by this path instead of the product"
)
CLEARED_IN_VAIN = "what is finite is written back as it was"
NOTHING_DROPPED = "no random number is below a threshold of 0: nothing is dropped, and weights have no sign to clear"
HINT = "a hint for the cache changes no result"
EARLIER = "the kernel that follows may begin later: it waits for the end of this one either way"
NOBODY_READS = "counters of turns are read only where sums are made in turn"
EVERYONE_WAITS = "others wait for the turn too, or instead: the barrier that follows makes all threads wait for it"
NOT_READ = "no query attends keys past the end, and what no query attends is not read"
ENDS_A_BLOCK = (
    "this wait only keeps the compiler from moving the one for a product: what it waits for is waited for before it is "
    "used, too"
)
NOT_FUSED = (
    "without fused products and sums, which mutants are compiled without, the exponent is 0 either way; optimised "
    "builds notice it in rows of many tiles"
)
LIES = (
    "lists lead astray only where lengths are invalid and two sequences share a place: an entry of another block is "
    "then found, or half of one; true lengths never come here, and any answer is right for the others"
)
ADDED_AGAIN = "an infinity or a NaN is added to a sum that has it already, which does not change it"

EQUIVALENT: dict[tuple[str, str, int], str] = {
    (SOFTMAX, "false: `rescale_factor[r] = rescale_factor[r] == row_max[r]`", 0): NOT_FUSED,
    (FWD_HOPPER, "false: `Config::kOutApart`", 2): "where the output has a place of its own, nobody waits for it to "
    "leave",
    (FWD_HOPPER, "true: `found`", 0): CLEARED_IN_VAIN,
    (FWD_HOPPER, "removed: `next_v.advance()`", 0): ENDS_A_BLOCK,
    (FWD_HOPPER, "removed: `smem_.pipe_v.wait(next_v)`", 0): ENDS_A_BLOCK,
    (COLUMNS, "removed: `smem_.pipe_dout.wait(at_dout_)`", 1): ENDS_A_BLOCK,
    ("cuda/attention/bwd_preprocess.h", "removed: `ptx::grid_launch_dependents()`", 0): EARLIER,
    (BWD_HOPPER, "removed: `ptx::grid_launch_dependents()`", 0): EARLIER,
    (BWD_HOPPER, "true: `next >= params.order.grid.num_blocks()`", 0): HINT,
    (BWD_HOPPER, "true: `tile.is_outside() \\|\\| tile.tiles().empty()`", 0): HINT,
    (BWD_HOPPER, "false: `tile.is_outside() \\|\\| tile.tiles().empty()`", 0): HINT,
    (BWD_HOPPER, "true: `!Config::kOwnsColumns`", 0): HINT,
    (BWD_HOPPER, "false: `!Config::kOwnsColumns`", 0): HINT,
    (BWD_HOPPER, "removed: `prefetch_next_block<Config, Variant>(params)`", 0): HINT,
    (
        BWD_HOPPER,
        "`<` becomes `<=`: `t = Config::kStagesDout < Config::kStagesQ \\|\\| is_`",
        0,
    ): "Q is asked for before dO then, as where dO has fewer stages",
    (COLUMNS, "true: `!is_full`", 0): MASKED_IN_VAIN,
    (KEYS, "true: `kBlockMasked \\|\\| (!Variant::kMasked && !tile_.is_full_bloc...`", 0): MASKED_IN_VAIN,
    (KEYS, "`==` becomes `!=`: `st bool adds_dq = stage == consumer_; if (`", 0): "the consumers change places",
    (KEYS, "false: `!in_turn`", 0): NOBODY_READS,
    (FWD_HOPPER, "true: `!tile.is_full_block(n)`", 0): MASKED_IN_VAIN,
    (FWD_HOPPER, "false: `tile.is_full_block(n)`", 0): SLOW_PATH,
    (REPEATS, "`>=` becomes `>`: `if (place < 0 \\|\\| place >= num_places) return kNon`", 0): LIES,
    (
        "cuda/sm90/fwd_config.h",
        "removed: `ptx::store_shared(repeats(), uint32_t(FwdRepeats::kNone))`",
        0,
    ): "whatever memory holds then is no place, or leads to a tile that is repeated in vain, and comes out the same",
    (REPEATS, "true: `index >= 0 && index < limit`", 0): LIES,
    (REPEATS, "`index < limit` becomes `true`", 0): LIES,
    (REPEATS, "`<` becomes `<=`: `urn index >= 0 && index < limit ? index : kNone;`", 0): LIES,
    (FWD_HOPPER, "`N` instead of `min(N, tile.seq.seqlen_k - n * N)`", 0): NOT_READ,
    (FWD_HOPPER, "`tile.seq.seqlen_k - n * N` instead of `min(N, tile.seq.seqlen_k - n * N)`", 0): ADDED_AGAIN,
    (COLUMNS, "true: `this->is_leader()`", 0): EVERYONE_WAITS,
    (COLUMNS, "false: `!params_.common.pass.deterministic`", 1): NOBODY_READS,
    (SOFTMAX, "true: `mask.template crosses<Edge::kAfter, At::kByKey>(queries, ...`", 0): MASKED_IN_VAIN,
    (SOFTMAX, "true: `mask.template crosses<Edge::kBefore, At::kByKey>(queries,...`", 0): MASKED_IN_VAIN,
    (
        "cuda/attention/rows.h",
        "false: `!p.paged_kv.block_table`",
        0,
    ): "kv_row_offset() finds rows without a table as well",
    (SCORES, "`<` becomes `<=`: `; return square < 0.04f ? x * series : la`", 0): "both formulas are right there",
    (SCORES, "false: `score.dropout.threshold == 0`", 0): NOTHING_DROPPED,
    (SCORES, "false: `score.dropout.threshold == 0`", 1): NOTHING_DROPPED,
    (BWD, "true: `Variant::kMasked && !is_full`", 0): SEARCHED_IN_VAIN,
    (BWD, "true: `!k_searched`", 0): "K is searched once more: it is the same",
    (BWD, "true: `!is_full`", 0): MASKED_IN_VAIN,
    (BWD, "true: `Variant::kMasked && nonfinite`", 0): SLOW_PATH,
    (BWD, "true: `ptx::thread_idx() == 0`", 0): EVERYONE_WAITS,
    (BWD, "`==` becomes `!=`: `if (ptx::thread_idx() == 0) ptx::wait_for_turn(t`", 0): EVERYONE_WAITS,
    (BWD, "true: `pass.deterministic`", 1): "turns are passed that nobody waits for",
    (FWD, "`N` instead of `min(N, 32)`", 0): "the same weights, more of them at a time: costs registers",
    (FWD, "`32` instead of `min(N, 32)`", 0): "no tile has fewer than 32 keys",
    (FWD, "true: `Variant::kMasked && !is_full`", 0): SEARCHED_IN_VAIN,
    (FWD, "true: `!is_full`", 0): MASKED_IN_VAIN,
    (FWD, "true: `Variant::kMasked && nonfinite`", 0): SLOW_PATH,
    (CONSUMER, "`<` becomes `<=`: `= tile.tiles().begin; m < tile.tiles().end; ++m)`", 0): "the tile after the last "
    "has no query that sees these keys: nothing is added to it",
    (CONSUMER, "false: `tile.is_full_block(m)`", 0): ADDED_AGAIN,
    (CONSUMER, "`seq.seqlen_q - m * M` instead of `min(M, seq.seqlen_q - m * M)`", 0): ADDED_AGAIN,
    (CONSUMER, "`N` instead of `min(N, tile.seq.seqlen_k - tile.n0)`", 0): NOT_READ,
    (CONSUMER, "`tile.seq.seqlen_k - tile.n0` instead of `min(N, tile.seq.seqlen_k - tile.n0)`", 0): ADDED_AGAIN,
    (CONSUMER, "true: `acc_dq.x[0][j] != 0.f`", 0): "zeros are added",
    (
        "policy/tile_order.h",
        "`grid.num_tiles` instead of `max(grid.num_tiles, 1)`",
        0,
    ): "TMA takes no tensor without rows, so no grid without tiles comes here",
    ("cuda/sm90/tile_queue.h", "false: `taken`", 0): "the division of tiles is fixed then: each is worked on once",
    (
        "cuda/tile/copy_sm80.h",
        "`kThreadRows` instead of `min(kThreadRows, kRows)`",
        0,
    ): "where the two differ, kPassRows does not divide kRows, and the static_assert below it fails",
    (
        "cuda/tile/store_rows.h",
        "false: `aligned && column + 1 < valid_cols`",
        0,
    ): "pairs are stored one element at a time",
}
