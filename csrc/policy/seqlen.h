// Start and length of one sequence of the batch. Device metadata is clamped to the true sizes of the tensors: an
// invalid length gives a wrong result for that sequence, never an out-of-bounds access.
#pragma once
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

struct Sequence {
    int64_t first_row_q, first_row_k;  // relative to the batch entry of a dense tensor, or to the packed tensor
    int32_t seqlen_q, seqlen_k;
    int32_t q_start, k_start;  // of a shard: position of the first query and key in the whole sequence; otherwise 0
    int32_t shift;             // position of the first query on the axis of keys, which starts at the first key
};

// Rows of one packed sequence, clamped to [0, total]: from cu_seqlens[batch] to cu_seqlens[batch + 1] or, with `used`,
// used[batch] rows; sequences may then have gaps between them and be in any order.
FA_HOST_DEVICE Sequence packed_range(const int32_t* cu_seqlens, const int32_t* used, int batch, int64_t total,
                                     int32_t max_seqlen, Sequence s, bool is_q) {
    const int64_t begin = clamp<int64_t>(cu_seqlens[batch], 0, total);
    const int64_t length = used ? used[batch] : cu_seqlens[batch + 1] - begin;
    (is_q ? s.first_row_q : s.first_row_k) = begin;
    (is_q ? s.seqlen_q : s.seqlen_k) = int32_t(clamp<int64_t>(length, 0, min<int64_t>(max_seqlen, total - begin)));
    return s;
}

// Rows of a sequence in a KV cache of `capacity` rows, once seqlen_new rows have been appended. A negative length means
// that the batch entry is not in use: it has no rows then, and none were appended.
FA_HOST_DEVICE int32_t length_with_new(int32_t length, int32_t seqlen_new, int32_t capacity) {
    return length < 0 ? 0 : min(min(length, capacity) + seqlen_new, capacity);
}

// Adds the positions to a sequence whose lengths are known.
FA_HOST_DEVICE Sequence placed(Sequence s, const Positions& p, int batch) {
    s.shift = s.seqlen_k - s.seqlen_q;
    if (!p.given) return s;
    s.q_start = clamp(p.q_starts ? p.q_starts[batch] : p.q_start, 0, max(kMaxPosition - s.seqlen_q, 0));
    s.k_start = clamp(p.k_starts ? p.k_starts[batch] : p.k_start, 0, max(kMaxPosition - s.seqlen_k, 0));
    s.shift = s.q_start - s.k_start;
    return s;
}

FA_HOST_DEVICE Sequence rows_of_sequence(const Seqlens& p, const PagedKv& paged, int batch) {
    Sequence s{0, 0, p.seqlen_q, p.seqlen_k, 0, 0, 0};
    if (p.cu_seqlens_q) s = packed_range(p.cu_seqlens_q, nullptr, batch, p.total_q, p.seqlen_q, s, true);
    if (p.cu_seqlens_k) {
        // Rows of a paged sequence are counted from its first page: cu_seqlens_k does not give its start.
        const int64_t capacity = int64_t(paged.max_pages) * paged.page_size;
        const int64_t total = paged.block_table ? int64_t(kMaxSeqlen) * 2 : p.total_k;
        s = packed_range(p.cu_seqlens_k, p.seqused_k, batch, total, p.seqlen_k, s, false);
        if (paged.block_table) {
            s.first_row_k = 0;
            s.seqlen_k = int32_t(min<int64_t>(s.seqlen_k, capacity));
        }
    } else if (p.seqused_k) {
        s.seqlen_k = length_with_new(p.seqused_k[batch], p.seqlen_new, s.seqlen_k);
    }
    if (p.leftpad_k) {
        const int32_t leftpad = clamp(p.leftpad_k[batch], 0, s.seqlen_k);
        s.first_row_k += leftpad;
        s.seqlen_k -= leftpad;
    }
    return s;
}

FA_HOST_DEVICE Sequence sequence_at(const Problem& p, int batch) {
    return placed(rows_of_sequence(p.seqlens, p.paged_kv, batch), p.positions, batch);
}

}  // namespace flash_attn
