// Attention masks. For ranges, a mask returns the visible keys or queries (kv_range, q_range) and whether a block needs
// no masking (is_full_block); for one pair, whether the query sees the key (keep). A block of scores is compared only
// with the mask edges that cross it.
//
// Masks are bottom-right aligned: the last query is at the position of the last key, unless the problem says where its
// queries and keys lie in a longer sequence. Causal is a window with right = 0. Blocks above the diagonal are skipped
// (FlashAttention-2, section 3.1.1).
#pragma once
#include "policy/host_device.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

struct Range {
    int begin, end;
    FA_HOST_DEVICE bool empty() const { return begin >= end; }
    FA_HOST_DEVICE Range or_none() const { return empty() ? Range{0, 0} : *this; }
    FA_HOST_DEVICE bool contains(Range part) const { return begin <= part.begin && part.end <= end; }
};

// Rows as tiles of `size` rows: tile i is [size * i, size * (i + 1)). An empty range of a mask has end <= 0, and so has
// the range of its tiles.
FA_HOST_DEVICE Range tiles_of(Range rows, int size) { return {rows.begin / size, ceil_div(rows.end, size)}; }

// Visible keys of one query, computed once and used for many keys. Int: a number, or a vector with one query per lane.
template <class Int> struct VisibleKeys {
    Int first, last;

    FA_HOST_DEVICE static VisibleKeys none() { return {0, -1}; }
    template <class Other> FA_HOST_DEVICE explicit operator VisibleKeys<Other>() const {
        return {Other(first), Other(last)};
    }

    template <class Key> FA_HOST_DEVICE auto keep(Key key) const { return (key >= first) & (key <= last); }
};

enum class Edge { kAfter, kBefore };  // hides the keys after, or those before, the visible keys

struct WindowMask {
    static constexpr bool kMasked = true;      // some pairs of a query and a key are hidden
    static constexpr bool kHasRanges = false;  // queries have ranges of their own (policy/range_mask.h)
    int seqlen_q, seqlen_k;
    int shift, k_start;  // those of the sequence
    int left, right;
    Chunks chunks;

    // The mask of one head of one sequence.
    FA_HOST_DEVICE static WindowMask of(const Problem& p, const Sequence& seq, int /*batch*/, int /*head*/) {
        return {seq.seqlen_q, seq.seqlen_k, seq.shift, seq.k_start, p.window.left, p.window.right, p.chunks};
    }

    // Position of a query on the axis of keys; negative if it is before the first key.
    FA_HOST_DEVICE int position(int row) const { return row + shift; }
    // First and last key of the chunk of a query, and position of the chunk of a key; without chunks, unbounded. Chunks
    // are counted from the start of the whole sequence. Branchless: kernels compute these for every row of a block.
    FA_HOST_DEVICE int first_of_chunk(int position) const {
        return chunks.size.quotient(max(position + k_start, 0)) * int(chunks.size.divisor) - k_start;
    }
    FA_HOST_DEVICE int last_of_chunk(int position) const {
        const int last = first_of_chunk(position) + (int(chunks.size.divisor) - 1);
        return position + k_start < chunks.lowest ? -1 : last;
    }
    // First and last key that a query sees, and query that sees a key. These ranges may be empty or out of bounds.
    FA_HOST_DEVICE int first_key(int row) const { return max(position(row) - left, first_of_chunk(position(row))); }
    FA_HOST_DEVICE int last_key(int row) const {
        return min(min(position(row) + right, last_of_chunk(position(row))), seqlen_k - 1);
    }
    FA_HOST_DEVICE int first_query(int key) const {
        return key < seqlen_k ? max(key - right, first_of_chunk(key) + chunks.lowest) - position(0) : kMaxSeqlen;
    }
    FA_HOST_DEVICE int last_query(int key) const {
        return min(key - position(0) + left, min(last_of_chunk(key), kMaxSeqlen) - position(0));
    }
    FA_HOST_DEVICE VisibleKeys<int> visible(int row) const {
        if (chunks.lowest == 0) return {first_key(row), last_key(row)};
        return {max(position(row) - left, 0), min(position(row) + right, seqlen_k - 1)};
    }
    template <bool kByKey = false> FA_HOST_DEVICE bool keep(int row, int key) const {
        return !hides<Edge::kAfter, kByKey>(row, key) && !hides<Edge::kBefore, kByKey>(row, key);
    }

    // Keys that at least one of the rows may see, and rows that may see at least one of the keys, without rows and keys
    // past the last ones. An empty range has end = 0.
    FA_HOST_DEVICE Range kv_range(Range rows) const {
        const int last = min(rows.end, seqlen_q) - 1;
        return Range{max(first_key(rows.begin), 0), last_key(last) + 1}.or_none();
    }
    // Keys that all of the rows see: blocks of others need masking.
    FA_HOST_DEVICE Range full_kv_range(Range rows) const { return {first_key(rows.end - 1), last_key(rows.begin) + 1}; }
    FA_HOST_DEVICE Range q_range(Range keys) const {
        const int last = min(keys.end, seqlen_k) - 1;
        return Range{max(first_query(keys.begin), 0), min(last_query(last) + 1, seqlen_q)}.or_none();
    }
    // For loops over the tiles of q_range(keys): whether a tile of rows sees some of the keys. The tiles of keys that
    // rows see in this way are those of kv_tiles().
    FA_HOST_DEVICE bool sees(Range, Range) const { return true; }
    FA_HOST_DEVICE Range kv_tiles(Range rows, int size) const { return tiles_of(kv_range(rows), size); }

    // crosses: an edge hides some key of a block from some row. hides: it hides one key from one row. Two equivalent
    // forms: kByKey compares queries with the bounds of a key, cheaper for few keys and many queries; the other form
    // compares keys with the bounds of a query.
    template <Edge kEdge, bool kByKey> FA_HOST_DEVICE bool crosses(Range rows, Range keys) const {
        return kEdge == Edge::kAfter ? hides<kEdge, kByKey>(rows.begin, keys.end - 1)
                                     : hides<kEdge, kByKey>(rows.end - 1, keys.begin);
    }
    template <Edge kEdge, bool kByKey> FA_HOST_DEVICE bool hides(int row, int key) const {
        if constexpr (kByKey)
            return kEdge == Edge::kAfter ? row < first_query(key) : row > last_query(key);
        else
            return kEdge == Edge::kAfter ? key > last_key(row) : key < first_key(row);
    }
    // Whether every row sees every key of the block.
    template <bool kByKey = false> FA_HOST_DEVICE bool is_full_block(Range rows, Range keys) const {
        if constexpr (kByKey)
            return !crosses<Edge::kAfter, true>(rows, keys) && !crosses<Edge::kBefore, true>(rows, keys);
        else
            return full_kv_range(rows).contains(keys);
    }
};

// No mask: every query sees every key. Equal to a window without bounds, but costs nothing.
struct FullMask {
    static constexpr bool kMasked = false, kHasRanges = false;
    int seqlen_q, seqlen_k;

    FA_HOST_DEVICE static FullMask of(const Problem&, const Sequence& seq, int /*batch*/, int /*head*/) {
        return {seq.seqlen_q, seq.seqlen_k};
    }

    template <bool kByKey = false> FA_HOST_DEVICE bool keep(int, int key) const { return key < seqlen_k; }
    FA_HOST_DEVICE Range kv_range(Range) const { return {0, seqlen_k}; }
    FA_HOST_DEVICE Range full_kv_range(Range) const { return {0, seqlen_k}; }
    FA_HOST_DEVICE Range q_range(Range) const { return {0, seqlen_q}; }
    FA_HOST_DEVICE bool sees(Range, Range) const { return true; }
    FA_HOST_DEVICE Range kv_tiles(Range rows, int size) const { return tiles_of(kv_range(rows), size); }
    template <Edge kEdge, bool kByKey> FA_HOST_DEVICE bool crosses(Range, Range keys) const {
        return kEdge == Edge::kAfter && keys.end > seqlen_k;
    }
    template <Edge kEdge, bool kByKey> FA_HOST_DEVICE bool hides(int, int key) const {
        return kEdge == Edge::kAfter && key >= seqlen_k;
    }
    template <bool kByKey = false> FA_HOST_DEVICE bool is_full_block(Range, Range keys) const {
        return keys.end <= seqlen_k;
    }
};

// Whether a problem needs more than FullMask.
FA_HOST_DEVICE bool masks_keys(const Problem& p) {
    return p.key_ranges.ranges || p.window.left < kMaxSeqlen || p.window.right < kMaxSeqlen || p.chunks.lowest == 0;
}

// size: keys per chunk; 0: no chunks.
inline Chunks make_chunks(int size) { return {make_divisor(size > 0 ? size : kMaxSeqlen), size > 0 ? 0 : -kMaxSeqlen}; }

}  // namespace flash_attn
