// Softmax weights as a matrix, one element at a time: only for tests and return_attn_probs.
#pragma once
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

template <class E> static void attn_probs(const ProbsParams& params, int batch, int head) {
    using T = Compute<E>;
    const Problem& p = params.problem;
    const Sequence seq = sequence_at(p, batch);
    const HeadVariant<T> variant(p, seq, batch, head);
    const DropoutMask& dropout = variant.score.dropout;
    const int head_k = head / (p.num_heads / p.num_heads_k);
    const int64_t row_length = p.seqlens.seqlen_k, rows = p.seqlens.seqlen_q;
    E* probs = static_cast<E*>(params.probs) + (int64_t(batch) * p.num_heads + head) * rows * row_length;
    memset(probs, 0, sizeof(E) * rows * row_length);
    for (int i = 0; i < seq.seqlen_q; ++i, probs += row_length) {
        const E* q = row_ptr<E>(p.q, batch, seq.first_row_q + i, head);
        const T lse = *row_ptr<T>(params.softmax_lse, batch, seq.first_row_q + i, head);
        const Range keys = variant.mask.kv_range({i, i + 1});
        for (int j = keys.begin; j < keys.end; ++j) {
            if (!variant.mask.keep(i, j)) continue;
            const E* k;
            collect_kv_rows<E>(p.k, p.paged_kv, batch, seq.first_row_k + j, head_k, 1, &k);
            T product = 0;
            for (int d = 0; k && d < p.head_dim; ++d) product += to_compute(q[d]) * to_compute(k[d]);
            Vec<T> value = splat(product);
            if (variant.modified) value = variant.transform(value, splat_int<T>(variant.score.distance(i, j)));
            value = exp2((value * variant.scale - lse) * T(kLog2e));
            store_elements(probs + j, dropout.threshold && dropout.drops(uint32_t(i), uint32_t(j)) ? -value : value, 1);
        }
    }
}

}  // namespace flash_attn::cpu::FA_ISA
