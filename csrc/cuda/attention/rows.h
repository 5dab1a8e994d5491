// Row pointers and tile loads for one head of one sequence in global memory.
#pragma once
#include "cuda/tile/copy_sm80.h"
#include "policy/paged_kv.h"
#include "policy/seqlen.h"
#include "policy/tile_order.h"

namespace flash_attn {

template <class Element> FA_DEVICE Element* head_of(const TensorView& t, int batch, int head) {
    return static_cast<Element*>(t.data) + batch * t.batch_stride + head * t.head_stride;
}
template <class Element> FA_DEVICE Element* row_of(const TensorView& t, int batch, int head, int64_t row) {
    return head_of<Element>(t, batch, head) + row * t.row_stride;
}
FA_DEVICE float* row_of(const RowView& t, int batch, int head, int64_t row) {
    return static_cast<float*>(t.data) + batch * t.batch_stride + head * t.head_stride + row;
}
// Calls f with a row of out, dq, dk or dv, whose elements are fp32 in partial results.
template <class Element, class F>
FA_DEVICE void with_result_row(const Problem& p, const TensorView& t, int batch, int head, int64_t row, F f) {
    p.float_results ? f(row_of<float>(t, batch, head, row)) : f(row_of<Element>(t, batch, head, row));
}
template <class Element>
FA_DEVICE StridedRows<Element> rows_from(const TensorView& t, int batch, int head, int64_t row) {
    return {row_of<Element>(t, batch, head, row), t.row_stride};
}

// The mask of a head or, of a mask with ranges, the same one computed again: loops have no registers to keep it.
template <class Mask> FA_DEVICE decltype(auto) fresh_mask(const Mask& mask, const Problem& p, int batch, int head) {
    if constexpr (Mask::kHasRanges) {
        const int same_batch = ptx::opaque(batch);
        return Mask::of(p, sequence_at(p, same_batch), same_batch, head);
    } else {
        return (mask);
    }
}

// Starts copying rows of K or V of a sequence from row n0 on, with cp.async. Rows past the sequence and rows of invalid
// pages are zero-filled.
template <class Element, int kThreads, int kRows, int kCols>
FA_DEVICE void load_keys(SmemTile<kRows, kCols> tile, const Problem& p, const TensorView& view, int batch, int head_k,
                         const Sequence& seq, int n0, int columns) {
    const int64_t first_row = seq.first_row_k + n0;
    const int valid_rows = seq.seqlen_k - n0;
    if (!p.paged_kv.block_table) {
        load_tile<kThreads>(tile, rows_from<Element>(view, batch, head_k, first_row), valid_rows, columns);
        return;
    }
    const Element* const pool = static_cast<const Element*>(view.data) + head_k * view.head_stride;
    const auto find_row = [&](int row) -> const Element* {
        const int64_t offset = kv_row_offset(view, p.paged_kv, batch, first_row + row);
        return offset < 0 ? nullptr : pool + offset;
    };
    TileCopy<kThreads, SmemTile<kRows, kCols>>(tile).load_found(pool, find_row, valid_rows, columns);
}

}  // namespace flash_attn
