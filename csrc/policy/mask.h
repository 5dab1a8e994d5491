// A mask answers three questions: which keys can a range of queries see, and the reverse; does a tile need masking at
// all; may one pair attend. Causal is a window with right = 0. Aligned bottom-right: the last query and the last key
// are on the diagonal. FlashAttention-2, section 3.1.1 (blocks wholly above the diagonal are skipped).
#pragma once
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

struct Range {
    int begin, end;
    FA_HOST_DEVICE bool empty() const { return begin >= end; }
};

struct WindowMask {
    static constexpr bool kMasked = true;  // from some queries and not from others
    int seqlen_q, seqlen_k;
    int left, right;

    FA_HOST_DEVICE int diagonal(int row) const { return row + seqlen_k - seqlen_q; }
    FA_HOST_DEVICE int first_key(int row) const { return max(diagonal(row) - left, 0); }
    FA_HOST_DEVICE int last_key(int row) const { return min(diagonal(row) + right, seqlen_k - 1); }
    FA_HOST_DEVICE bool hides_before(int row, int key) const { return key < first_key(row); }
    FA_HOST_DEVICE bool hides_after(int row, int key) const { return key > last_key(row); }
    FA_HOST_DEVICE bool keep(int row, int key) const { return !hides_before(row, key) && !hides_after(row, key); }

    // Keys that at least one of the rows may see. Rows past the last one change nothing: it sees the last key. An empty
    // range ends at or before 0.
    FA_HOST_DEVICE Range kv_range(Range rows) const { return {first_key(rows.begin), last_key(rows.end - 1) + 1}; }
    // Rows that may see at least one of the keys. Keys past the last one change nothing: the last row sees it. An empty
    // range ends at or before 0.
    FA_HOST_DEVICE Range q_range(Range keys) const {
        const int shift = seqlen_k - seqlen_q;
        return {max(keys.begin - shift - right, 0), min(keys.end - shift + left, seqlen_q)};
    }
    // The same of any of the rows and any of the keys.
    FA_HOST_DEVICE bool hides_before(Range rows, Range keys) const { return hides_before(rows.end - 1, keys.begin); }
    FA_HOST_DEVICE bool hides_after(Range rows, Range keys) const { return hides_after(rows.begin, keys.end - 1); }
    // Every one of the rows sees every one of the keys.
    FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const {
        return !hides_before(rows, keys) && !hides_after(rows, keys);
    }
};

// Every query sees every key: a window without bounds, with less to compute.
struct FullMask {
    static constexpr bool kMasked = false;
    int seqlen_q, seqlen_k;

    FA_HOST_DEVICE bool hides_after(int, int key) const { return key >= seqlen_k; }
    FA_HOST_DEVICE bool keep(int row, int key) const { return !hides_after(row, key); }
    FA_HOST_DEVICE Range kv_range(Range) const { return {0, seqlen_k}; }
    FA_HOST_DEVICE Range q_range(Range) const { return {0, seqlen_q}; }
    FA_HOST_DEVICE bool hides_after(Range, Range keys) const { return keys.end > seqlen_k; }
    FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const { return !hides_after(rows, keys); }
};

FA_HOST_DEVICE bool is_full(const Window& w) { return w.left >= kMaxSeqlen && w.right >= kMaxSeqlen; }

// The mask of one sequence.
template <class Mask> FA_HOST_DEVICE Mask make_mask(int seqlen_q, int seqlen_k, const Window& w) {
    if constexpr (Mask::kMasked)
        return {seqlen_q, seqlen_k, w.left, w.right};
    else
        return {seqlen_q, seqlen_k};
}

}  // namespace flash_attn
