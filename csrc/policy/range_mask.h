// A window in which each query sees only keys of a range of its own: prefix-LM and document masks, in linear memory.
//
// Ranges of neighbouring queries are summed up in blocks, so that tiles that nobody sees are skipped, and those that
// everybody sees need no masking, without reading every range.
#pragma once
#include "policy/host_device.h"
#include "policy/mask.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

constexpr int kRangeBlock = 64;  // queries or keys
// Of queries in the backward pass on a GPU: a multiple of its tiles and of blocks.
constexpr int kRangeTile = 128;

struct RangeMask {
    static constexpr bool kMasked = true, kHasRanges = true;
    WindowMask window;
    const int32_t* ranges;  // [seqlen_q, 2]: those of the sequence; null: no ranges
    const QueryBlock* query_blocks;
    const KeyBlock* key_blocks;

    FA_HOST_DEVICE static int num_query_blocks(const Problem& p) { return ceil_div(p.seqlens.seqlen_q, kRangeBlock); }
    FA_HOST_DEVICE static int num_key_blocks(const Problem& p) { return ceil_div(p.seqlens.seqlen_k, kRangeBlock); }

    FA_HOST_DEVICE static RangeMask of(const Problem& p, const Sequence& seq, int batch, int head) {
        const WindowMask window = WindowMask::of(p, seq, batch, head);
        const KeyRanges& r = p.key_ranges;
        if (!r.ranges) return {window, nullptr, nullptr, nullptr};
        return {window, r.ranges + 2 * (batch * r.batch_stride + seq.first_row_q),
                r.query_blocks + int64_t(batch) * num_query_blocks(p),
                r.key_blocks + int64_t(batch) * num_key_blocks(p)};
    }

    // Keys in the range of a query, whatever the window hides. Rows past the last one are as the last one.
    FA_HOST_DEVICE Range range_of(int row) const {
        const int32_t* const range = ranges + 2 * int64_t(min(row, window.seqlen_q - 1));
        return Range{max(range[0], 0), min(range[1], window.seqlen_k)}.or_none();
    }

    FA_HOST_DEVICE int position(int row) const { return window.position(row); }
    FA_HOST_DEVICE VisibleKeys<int> visible(int row) const {
        const VisibleKeys<int> seen = window.visible(row);
        if (!ranges) return seen;
        const Range range = range_of(row);
        return {max(seen.first, range.begin), min(seen.last, range.end - 1)};
    }
    template <bool kByKey = false> FA_HOST_DEVICE bool keep(int row, int key) const {
        return window.keep<kByKey>(row, key) && in_range(row, key);
    }
    FA_HOST_DEVICE bool in_range(int row, int key) const {
        if (!ranges) return true;
        const Range range = range_of(row);
        return key >= range.begin && key < range.end;
    }
    FA_HOST_DEVICE Range kv_range(Range rows) const {
        const Range seen = window.kv_range(rows);
        if (!ranges) return seen;
        const Range any = keys_of_any(rows);
        return Range{max(seen.begin, any.begin), min(seen.end, any.end)}.or_none();
    }
    FA_HOST_DEVICE Range q_range(Range keys) const {
        const Range seen = window.q_range(keys);
        if (!ranges) return seen;
        Range any{kMaxSeqlen, 0};
        for (int key = keys.begin; key < min(keys.end, window.seqlen_k); key = next_block(key)) {
            const KeyBlock& block = key_blocks[key / kRangeBlock];
            if (block.first_query < block.end_query)
                any = {min(any.begin, block.first_query), max(any.end, block.end_query)};
        }
        return Range{max(seen.begin, any.begin), min(seen.end, any.end)}.or_none();
    }
    FA_HOST_DEVICE bool sees(Range rows, Range keys) const {
        if (!ranges) return true;
        const Range any = keys_of_any(rows);
        return any.begin < keys.end && keys.begin < any.end;
    }
    FA_HOST_DEVICE Range kv_tiles(Range rows, int size) const {
        const Range seen = window.kv_tiles(rows, size);
        if (!ranges) return seen;
        const Range any = tiles_of(keys_of_any(rows), size);
        return {max(seen.begin, any.begin), min(seen.end, any.end)};
    }
    // As far as the summaries of the rows tell.
    template <bool kByKey = false> FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const {
        if (!window.is_full_block<kByKey>(rows, keys)) return false;
        return !ranges || keys_of_all(rows).contains(keys);
    }

    // The summaries. One query's range, and those of several from those of its parts.
    FA_HOST_DEVICE QueryBlock summary_of(int row) const {
        const Range range = range_of(row);
        return range.empty() ? QueryBlock{kMaxSeqlen, 0, 0, 0}
                             : QueryBlock{range.begin, range.end, range.begin, range.end};
    }
    FA_HOST_DEVICE static QueryBlock join(const QueryBlock& a, const QueryBlock& b) {
        return {min(a.any_begin, b.any_begin), max(a.any_end, b.any_end), max(a.all_begin, b.all_begin),
                min(a.all_end, b.all_end)};
    }
    // Whether a query sees some of the keys of a block, whatever the window hides.
    FA_HOST_DEVICE bool sees_block(int row, int block) const {
        const Range range = range_of(row);
        return range.begin < (block + 1) * kRangeBlock && range.end > block * kRangeBlock;
    }

private:
    FA_HOST_DEVICE static int next_block(int i) { return round_down(i, kRangeBlock) + kRangeBlock; }
    // Of all blocks that have some of the rows.
    FA_HOST_DEVICE QueryBlock summary(Range rows) const {
        QueryBlock sum{kMaxSeqlen, 0, 0, kMaxSeqlen};
        for (int row = rows.begin; row < min(rows.end, window.seqlen_q); row = next_block(row))
            sum = join(sum, query_blocks[row / kRangeBlock]);
        return sum;
    }
    FA_HOST_DEVICE Range keys_of_any(Range rows) const {
        const QueryBlock sum = summary(rows);
        return {sum.any_begin, sum.any_end};
    }
    FA_HOST_DEVICE Range keys_of_all(Range rows) const {
        const QueryBlock sum = summary(rows);
        return {sum.all_begin, sum.all_end};
    }
};

}  // namespace flash_attn
