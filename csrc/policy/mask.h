// Which keys a query sees. A mask answers for ranges what can be seen at all (kv_range, q_range) and whether a block
// needs no masking (is_full_block), and for one pair whether it attends (keep). The edges of a mask are what keep() is
// made of: a block of scores is compared with those only that pass through it.
//
// Aligned bottom-right: the last query and the last key are on the diagonal. Causal is a window with right = 0.
// FlashAttention-2, section 3.1.1 (blocks wholly above the diagonal are skipped).
#pragma once
#include "policy/host_device.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

struct Range {
    int begin, end;
    FA_HOST_DEVICE bool empty() const { return begin >= end; }
};

// What one query sees, for those who ask about many keys. Int: a number, or a vector with a query in every lane.
template <class Int> struct VisibleKeys {
    Int first, last;

    FA_HOST_DEVICE static VisibleKeys none() { return {0, -1}; }
    template <class Other> FA_HOST_DEVICE explicit operator VisibleKeys<Other>() const {
        return {Other(first), Other(last)};
    }

    template <class Key> FA_HOST_DEVICE auto keep(Key key) const { return (key >= first) & (key <= last); }
    FA_HOST_DEVICE void set(int lane, const VisibleKeys<int>& row) { first[lane] = row.first, last[lane] = row.last; }
};

struct WindowMask {
    static constexpr bool kMasked = true;  // hides keys from some queries and not from others
    int seqlen_q, seqlen_k;
    int left, right;

    // The mask of a head of a sequence.
    FA_HOST_DEVICE static WindowMask of(const Problem& p, const Sequence& seq, int /*batch*/, int /*head*/) {
        return {seq.seqlen_q, seq.seqlen_k, p.window.left, p.window.right};
    }

    FA_HOST_DEVICE int diagonal(int row) const { return row + seqlen_k - seqlen_q; }
    FA_HOST_DEVICE int first_key(int row) const { return max(diagonal(row) - left, 0); }
    FA_HOST_DEVICE int last_key(int row) const { return min(diagonal(row) + right, seqlen_k - 1); }
    FA_HOST_DEVICE VisibleKeys<int> visible(int row) const { return {first_key(row), last_key(row)}; }
    FA_HOST_DEVICE bool keep(int row, int key) const { return !hides<0>(row, key) && !hides<1>(row, key); }

    // Keys that at least one of the rows may see. Rows past the last one change nothing: it sees the last key. An empty
    // range ends at or before 0.
    FA_HOST_DEVICE Range kv_range(Range rows) const { return {first_key(rows.begin), last_key(rows.end - 1) + 1}; }
    // Rows that may see at least one of the keys. Keys past the last one change nothing: the last row sees it. An empty
    // range ends at or before 0.
    FA_HOST_DEVICE Range q_range(Range keys) const {
        const int shift = seqlen_k - seqlen_q;
        return {max(keys.begin - shift - right, 0), min(keys.end - shift + left, seqlen_q)};
    }
    // Every one of the rows sees every one of the keys.
    FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const {
        return !crosses<0>(rows, keys) && !crosses<1>(rows, keys);
    }

    // Edge 0 hides the keys after it, edge 1 those before it.
    static constexpr int kEdges = 2;
    template <int kEdge> FA_HOST_DEVICE bool hides(int row, int key) const {
        return kEdge == 0 ? key > last_key(row) : key < first_key(row);
    }
    // Whether the edge hides any of the keys from any of the rows.
    template <int kEdge> FA_HOST_DEVICE bool crosses(Range rows, Range keys) const {
        return kEdge == 0 ? hides<0>(rows.begin, keys.end - 1) : hides<1>(rows.end - 1, keys.begin);
    }
};

// Every query sees every key: a window without bounds, with less to compute.
struct FullMask {
    static constexpr bool kMasked = false;
    int seqlen_q, seqlen_k;

    FA_HOST_DEVICE static FullMask of(const Problem&, const Sequence& seq, int /*batch*/, int /*head*/) {
        return {seq.seqlen_q, seq.seqlen_k};
    }

    FA_HOST_DEVICE bool keep(int, int key) const { return key < seqlen_k; }
    FA_HOST_DEVICE Range kv_range(Range) const { return {0, seqlen_k}; }
    FA_HOST_DEVICE Range q_range(Range) const { return {0, seqlen_q}; }
    FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const { return !crosses<0>(rows, keys); }

    static constexpr int kEdges = 1;
    template <int> FA_HOST_DEVICE bool hides(int, int key) const { return key >= seqlen_k; }
    template <int> FA_HOST_DEVICE bool crosses(Range, Range keys) const { return keys.end > seqlen_k; }
};

// Whether a problem needs more than FullMask.
FA_HOST_DEVICE bool masks_keys(const Problem& p) { return p.window.left < kMaxSeqlen || p.window.right < kMaxSeqlen; }

}  // namespace flash_attn
