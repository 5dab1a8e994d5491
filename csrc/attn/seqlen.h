// Where one sequence of the batch lies. Device metadata is clamped to the true sizes of the tensors: a wrong length
// gives a wrong answer for that sequence, never an access outside.
#pragma once
#include "host_device.h"
#include "params.h"

namespace flash_attn {

struct Sequence {
    int64_t first_row_q, first_row_k;  // within the batch entry of a dense tensor, or within a packed tensor
    int32_t seqlen_q, seqlen_k;
};

// cu_seqlens[batch] and its successor as a range inside [0, total].
FA_HOST_DEVICE Sequence packed_range(const int32_t* cu_seqlens, int batch, int64_t total, int32_t max_seqlen,
                                     Sequence s, bool is_q) {
    const int64_t begin = clamp<int64_t>(cu_seqlens[batch], 0, total);
    const int64_t length =
        clamp<int64_t>(int64_t(cu_seqlens[batch + 1]) - begin, 0, min<int64_t>(max_seqlen, total - begin));
    (is_q ? s.first_row_q : s.first_row_k) = begin;
    (is_q ? s.seqlen_q : s.seqlen_k) = int32_t(length);
    return s;
}

FA_HOST_DEVICE Sequence sequence_at(const Seqlens& p, const PagedKv& paged, int batch) {
    Sequence s{0, 0, p.seqlen_q, p.seqlen_k};
    if (p.cu_seqlens_q) s = packed_range(p.cu_seqlens_q, batch, p.total_q, p.seqlen_q, s, true);
    if (p.cu_seqlens_k) {
        // The rows of a paged sequence are counted from its first page, wherever cu_seqlens_k says it starts.
        const int64_t capacity = int64_t(paged.max_pages) * paged.page_size;
        const int64_t total = paged.block_table ? int64_t(kMaxSeqlen) * 2 : p.total_k;
        s = packed_range(p.cu_seqlens_k, batch, total, p.seqlen_k, s, false);
        if (paged.block_table) {
            s.first_row_k = 0;
            s.seqlen_k = int32_t(min<int64_t>(s.seqlen_k, capacity));
        }
    }
    if (p.seqused_k) s.seqlen_k = clamp(p.seqused_k[batch], 0, s.seqlen_k);
    if (p.leftpad_k) {
        const int32_t leftpad = clamp(p.leftpad_k[batch], 0, s.seqlen_k);
        s.first_row_k += leftpad;
        s.seqlen_k -= leftpad;
    }
    return s;
}

}  // namespace flash_attn
