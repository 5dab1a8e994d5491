// What the backward pass does with the rows of queries of one head: dsoftmax_sum before the key tiles, dQ after them.
#pragma once
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

// Row length of dq_accum and of packed rows.
template <class T> FA_INLINE int padded_row(int head_dim) { return round_up(head_dim, kLanes<T>); }

constexpr int kPreprocessRows = 64;

// dsoftmax_sum = rowsum(dout * out), for one head of one sequence, summed in the order of dP = dO V^T: for a query that
// sees a single key, out is v, and dP - dsoftmax_sum is exactly 0, as it must be.
template <class E, class Dot> static void bwd_preprocess(const BwdParams& params, int batch, int head, void* scratch) {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    using PackE = Pack<E, Dot>;
    constexpr int kRows = kPreprocessRows;
    const Problem& p = params.problem;
    const Sequence seq = sequence_at(p, batch);
    Arena arena(scratch);
    const int depth = PackE::depth_of(p.head_dim_v);
    // [depth][kRows]
    Operand *out_t = arena.take<Operand>(kRows * depth), *dout_t = arena.take<Operand>(kRows * depth);
    for (int row0 = 0; row0 < seq.seqlen_q; row0 += kRows) {
        const int count = min(kRows, seq.seqlen_q - row0);
        const E* rows[kRows];
        collect_rows<E>(params.out, batch, seq.first_row_q + row0, head, count, rows);
        PackE::transposed(rows, count, kRows, p.head_dim_v, {out_t, kRows});
        collect_rows<E>(params.dout, batch, seq.first_row_q + row0, head, count, rows);
        PackE::transposed(rows, count, kRows, p.head_dim_v, {dout_t, kRows});
        T sums[kRows];
        for (int i = 0; i < kRows; i += kLanes<T>) {
            Vec<T> sum{};
            for (int k0 = 0; k0 < depth; k0 += kLongestSum) {
                Vec<T> part{};
                for (int k = k0; k < min(k0 + kLongestSum, depth); ++k)
                    part = Dot::multiply_add(part, load(dout_t + k * kRows + i), load(out_t + k * kRows + i));
                sum += part;
            }
            store(sums + i, sum);
        }
        memcpy(row_ptr<T>(params.dsoftmax_sum, batch, seq.first_row_q + row0, head), sums, sizeof(T) * count);
    }
}
static size_t bwd_preprocess_scratch(const BwdParams& params) {
    return size_t(2 * kPreprocessRows) * params.problem.head_dim_v * sizeof(double);
}

// dQ of one head of one sequence: the sum over splits in a fixed order, times softmax_scale. dlse is subtracted from
// dsoftmax_sum only here: the main pass adds it to dP - rowsum(dout * out), which may be much smaller than either term.
template <class E> static void bwd_postprocess(const BwdParams& params, const BwdTask& task, int head) {
    using T = Compute<E>;
    const Problem& p = params.problem;
    const Sequence seq = sequence_at(p, task.batch);
    const int row_length = padded_row<T>(p.head_dim);
    const int64_t split_stride = int64_t(p.num_heads) * seq.seqlen_q * row_length;
    const T* accum = static_cast<const T*>(task.dq_accum) + int64_t(head) * seq.seqlen_q * row_length;
    for (int i = 0; i < seq.seqlen_q; ++i, accum += row_length) {
        const int64_t row = seq.first_row_q + i;
        with_result_row<E>(p, params.dq, task.batch, row, head, [&](auto* dq) {
            for_each_vector<T>(p.head_dim, [&](int d, int n) {
                Vec<T> sum = load(accum + d);
                for (int split = 1; split < task.num_splits; ++split) sum += load(accum + split * split_stride + d);
                store_some(dq + d, sum * T(p.score.softmax_scale), n);
            });
        });
        T* const dsoftmax_sum = row_ptr<T>(params.dsoftmax_sum, task.batch, row, head);
        if (std::isinf(*row_ptr<T>(params.softmax_lse, task.batch, row, head)))
            *dsoftmax_sum = T(0);  // no visible keys: no gradients
        else if (params.dlse.data)
            *dsoftmax_sum -= *row_ptr<T>(params.dlse, task.batch, row, head);
    }
}

}  // namespace flash_attn::cpu::FA_ISA
