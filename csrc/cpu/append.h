// Appends one new row of k and v to a KV cache and rotates one row of q, for all heads.
#pragma once
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

template <class E> FA_INLINE void store_one(E* p, Compute<E> x) { store_elements(p, splat<Compute<E>>(x), 1); }

// Copies a row of one head, its first rotary_dim elements rotated by the angles of `position` (RoFormer, section
// 3.2.2). A position outside the tables takes the nearest row: on the CPU it is an error before this.
template <class E> static void rotate_row(const Rotary& r, int64_t position, int head_dim, const E* in, E* out) {
    memcpy(out, in, sizeof(E) * head_dim);
    if (!r.cos) return;
    const int64_t row = clamp<int64_t>(position, 0, r.seqlen_rotary - 1);
    const E* const cos = static_cast<const E*>(r.cos) + row * r.cos_row_stride;
    const E* const sin = static_cast<const E*>(r.sin) + row * r.sin_row_stride;
    const int pairs = r.rotary_dim / 2;
    for (int i = 0; i < pairs; ++i) {
        const int a = r.interleaved ? 2 * i : i, b = r.interleaved ? 2 * i + 1 : i + pairs;
        const auto x = to_compute(in[a]), y = to_compute(in[b]), c = to_compute(cos[i]), s = to_compute(sin[i]);
        store_one(out + a, x * c - y * s);
        store_one(out + b, x * s + y * c);
    }
}

template <class E> static void append(const AppendParams& params, int batch, int row) {
    const Problem& p = params.problem;
    const Seqlens& s = p.seqlens;
    const int64_t length = s.seqused_k ? s.seqused_k[batch] : params.length;
    if (params.q_rotated.data && row < s.seqlen_q) {
        const int64_t position = max<int64_t>(length, 0) + (params.rotary.queries_advance ? row : 0);
        for (int head = 0; head < p.num_heads; ++head)
            rotate_row<E>(params.rotary, position, p.head_dim, row_ptr<E>(p.q, batch, row, head),
                          row_ptr<E>(params.q_rotated, batch, row, head));
    }
    if (length < 0 || row >= s.seqlen_new || length + row >= params.capacity) return;
    const int64_t k = kv_row_offset(p.k, p.paged_kv, batch, length + row),
                  v = kv_row_offset(p.v, p.paged_kv, batch, length + row);
    if (k < 0) return;  // a page outside the pool
    for (int head = 0; head < p.num_heads_k; ++head) {
        rotate_row<E>(params.rotary, length + row, p.head_dim, row_ptr<E>(params.k_new, batch, row, head),
                      static_cast<E*>(p.k.data) + k + head * p.k.head_stride);
        if (params.v_new.data)
            memcpy(static_cast<E*>(p.v.data) + v + head * p.v.head_stride, row_ptr<E>(params.v_new, batch, row, head),
                   sizeof(E) * p.head_dim_v);
    }
}

}  // namespace flash_attn::cpu::FA_ISA
