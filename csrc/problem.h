// One attention problem as plain data, shared by the torch code, the CPU backend and the CUDA kernels. No torch and no
// CUDA headers. Strides are in elements; every tensor offset is computed in 64 bits.
#pragma once
#include <cstdint>
#include "policy/divisor.h"

namespace flash_attn {

enum class ElementType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Every length is less than this, and unbounded windows are this wide: the sum of two of them fits in 32 bits.
constexpr int32_t kMaxSeqlen = 1 << 30;
// Positions in a longer sequence are less than this: those of the rows by which a last tile exceeds it fit, too.
constexpr int32_t kMaxPosition = kMaxSeqlen - 256;

// Shape [batch_size, seqlen, heads, head_dim] or, packed, [total, heads, head_dim] with batch_stride 0. The last
// dimension is contiguous.
struct TensorView {
    void* data;
    int64_t batch_stride, row_stride, head_stride;
};

// One value per query and head: [batch_size, num_heads, seqlen_q] or, packed, [num_heads, total_q] with batch_stride 0.
// Queries are contiguous. fp32, or fp64 for fp64 elements. data is null where an optional tensor is absent.
struct RowView {
    void* data;
    int64_t batch_stride, head_stride;
};

// Start and length of each sequence. Dense: all pointers except seqused_k and leftpad_k are null.
struct Seqlens {
    const int32_t* cu_seqlens_q;  // [batch_size + 1], or null
    const int32_t* cu_seqlens_k;  // [batch_size + 1], or null; with seqused_k it gives only the starts
    const int32_t* seqused_k;     // [batch_size]: number of valid keys from the start of the sequence, or null
    const int32_t* leftpad_k;     // [batch_size]: number of padding keys to skip at the start, or null
    int64_t total_q, total_k;     // packed: rows of q and of k; dense: unused
    int32_t seqlen_q, seqlen_k;   // dense: rows; packed: upper bound of the sequence lengths
    int32_t seqlen_new = 0;       // with a KV cache: rows appended to it, which seqused_k does not count; otherwise 0
};

// Paged KV cache: row j of sequence b is row j % page_size of page block_table[b][j / page_size].
struct PagedKv {
    const int32_t* block_table;  // [batch_size, max_pages], or null
    int64_t batch_stride;        // of block_table
    int32_t max_pages, num_pages, page_size;
};

// Where the queries and keys at hand lie in a longer sequence, of which other devices have the rest: query i at q_start
// + i, key j at k_start + j, all below kMaxPosition. Not given: the last query is at the position of the last key. With
// dropout, starts are multiples of kStartAlignment.
struct Positions {
    bool given;
    const int32_t *q_starts, *k_starts;  // [batch_size], or null: of every sequence
    int32_t q_start, k_start;
};

// Query i sees key j iff i + shift - left <= j <= i + shift + right, with shift = seqlen_k - seqlen_q or, where
// positions are given, q_start - k_start.
struct Window {
    int32_t left, right;  // kMaxSeqlen: unbounded
};

// Chunked attention: in addition, position i + shift and key j must be in the same chunk of `size` consecutive keys.
struct Chunks {
    Divisor size;    // chunk size; kMaxSeqlen: a single chunk
    int32_t lowest;  // lower bound of positions: 0 with chunks, -kMaxSeqlen without
};

// What is known of the ranges of 64 queries (policy/range_mask.h): keys that any of them sees, and keys that all see.
struct QueryBlock { int32_t any_begin, any_end, all_begin, all_end; };
// Queries among which are all that see any of 64 keys; begin >= end: none.
struct KeyBlock { int32_t first_query, end_query; };

// Key ranges: in addition, query i sees only keys of [begin, end) = ranges[i], clamped to the sequence; none where that
// is empty.
struct KeyRanges {
    const int32_t* ranges;  // [batch_size, seqlen_q, 2] or, packed, [total_q, 2], contiguous; null: no ranges
    int64_t batch_stride;   // in queries; 0 for packed queries and where all sequences share the ranges
    // Of each sequence, as many as the longest may need; made by the backend.
    const QueryBlock* query_blocks;  // [batch_size, ceil(seqlen_q / 64)]
    const KeyBlock* key_blocks;      // [batch_size, ceil(seqlen_k / 64)]
};

struct ScoreParams {
    double softmax_scale;        // > 0
    double softcap;              // scores become softcap * tanh(score / softcap); 0: off
    const float* alibi_slopes;   // [num_heads] or [batch_size, num_heads], or null
    int64_t alibi_batch_stride;  // 0 for [num_heads]
    // [num_heads], or null: attention sinks, scores (natural logarithms, not scaled) of a key without value that every
    // query sees and dropout never drops. Of the type of softmax_lse; -infinity: no sink.
    const void* sinks;
};

struct DropoutParams {
    uint32_t threshold;  // a weight is dropped iff its 16 random bits are below: probability threshold / 2^16; 0: off
    uint64_t seed, offset;
    const int64_t* state;                 // [2], device memory: seed and offset; null: the two fields above are used
    int32_t head_start, heads_elsewhere;  // of a shard of heads: those before it, and all that are not in it
};

// softmax_scale and softcap as kernels use them (policy/scalars.h): softmax_scale, softmax_scale * log2(e),
// softmax_scale / softcap (0: no softcap), softcap, and the rescale factor of the weights that dropout keeps.
template <class Real> struct Scalars { Real scale, scale_log2, scale_over_cap, softcap, dropout_rescale; };

// The inputs that all passes share.
struct Problem {
    ElementType type;
    int32_t batch_size, num_heads, num_heads_k, head_dim, head_dim_v;
    TensorView q;  // [batch_size, seqlen_q, num_heads, head_dim] or [total_q, num_heads, head_dim]
    TensorView k;  // [batch_size, seqlen_k, num_heads_k, head_dim] or [total_k, ...] or [num_pages, page_size, ...]
    TensorView v;  // as k, with head_dim_v
    Seqlens seqlens;
    PagedKv paged_kv;
    Positions positions;
    Window window;
    Chunks chunks;  // from make_chunks() of policy/mask.h
    KeyRanges key_ranges;
    ScoreParams score;
    DropoutParams dropout;
    Scalars<float> scalars;
    bool float_results;  // out, dq, dk and dv are not rounded to the element type: partial results, to be summed
};

struct FwdParams {
    Problem problem;
    TensorView out;          // as q, with head_dim_v
    RowView softmax_lse;     // natural logarithm; without sinks -infinity for a query without visible keys
    int32_t num_splits = 0;  // chunks that the keys of a sequence may be split into; 0: chosen from its own length
    bool inference = false;  // no backward pass computes the scores again, so they may be rounded in another way
    // [batch_size, num_heads], of the type of softmax_lse, or null: the largest scores of visible pairs, without sinks.
    // The caller sets them to -infinity.
    void* max_logits = nullptr;
};

// Rotary position embeddings. cos and sin: [seqlen_rotary, rotary_dim / 2], rows contiguous, element type of q.
struct Rotary {
    const void *cos, *sin;  // null: no rotation
    int64_t cos_row_stride, sin_row_stride;
    int32_t seqlen_rotary, rotary_dim;
    bool interleaved;      // pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2)
    bool queries_advance;  // query i is at the position of the i-th new row; otherwise all are at that of the first
};

// Appends new rows to a KV cache, in place, and rotates them and the queries. Row j is appended to sequence b as row
// length[b] + j of the cache, and that is its position.
struct AppendParams {
    Problem problem;          // k and v: the caches; seqlens.seqlen_new: rows to append
    TensorView k_new, v_new;  // [batch_size, seqlen_new, num_heads_k, head_dim]; v_new.data null: values are keys
    int32_t length;           // of every sequence, where seqlens.seqused_k is null; negative: nothing is appended
    int64_t capacity;         // rows of a sequence that the cache has room for; rows past it are not written
    Rotary rotary;
    TensorView q_rotated;  // output, as q; data null without rotation
};

struct BwdParams {
    Problem problem;       // not paged
    TensorView out, dout;  // as q, with head_dim_v
    RowView softmax_lse;   // from the forward pass; +infinity is treated like -infinity
    RowView dlse;          // gradient of softmax_lse, or null
    TensorView dq, dk, dv;
    RowView dsoftmax_sum;  // output: rowsum(dout * out) - dlse; 0 where softmax_lse is infinite
    bool deterministic;
};

// The attention matrix, for tests and return_attn_probs: [batch_size, num_heads, seqlen_q, seqlen_k], contiguous,
// element type of q. Dropped weights have their sign bit set; elements outside a sequence are 0.
struct ProbsParams {
    Problem problem;
    RowView softmax_lse;
    void* probs;
};

}  // namespace flash_attn
