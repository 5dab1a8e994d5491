// P = exp(S - softmax_lse) as a full matrix in global memory, for tests and return_attn_probs. One block per query
// tile; S is recomputed tile by tile as in the backward pass. One instance serves all variants: speed does not matter.
#pragma once
#include "cuda/attention/rows.h"
#include "cuda/attention/softmax_bwd.h"
#include "cuda/ptx/sync.h"
#include "cuda/sm80/fwd_config.h"
#include "cuda/tile/gemm_sm80.h"
#include "policy/variant.h"

namespace flash_attn {

template <class Config> FA_KERNEL(Config::kThreads, 1) attn_probs_sm80(FA_GRID_CONSTANT ProbsParams params) {
    using Element = typename Config::Element;
    constexpr int M = Config::kBlockM, N = Config::kBlockN, kThreads = Config::kThreads;
    const Problem& p = params.problem;
    const auto [m, head, batch] = query_grid(p, M).at(ptx::block_idx());
    const Sequence seq = sequence_at(p, batch);
    const int m0 = m * M, warp_row0 = warp_id() * Config::kWarpRows, row0 = m0 + warp_row0;
    if (m0 >= seq.seqlen_q) return;
    const AttentionVariant<RangeMask, ModifiedScore<float>> variant(p, seq, batch, head);
    const auto& mask = variant.mask;
    const auto& score = variant.score;
    const Range tiles = tiles_of(mask.kv_range({m0, m0 + M}), N);

    using Smem = typename Config::Smem;
    const ptx::SmemPtr smem = ptx::smem();
    const typename Config::TileQ sQ{smem + offsetof(Smem, q)};
    const typename Config::TileK sK{smem + offsetof(Smem, k)};
    const int64_t first_row = seq.first_row_q + m0;
    if (!tiles.empty())
        load_tile<kThreads>(sQ, rows_from<Element>(p.q, batch, head, first_row), seq.seqlen_q - m0, p.head_dim);
    const float* const lse = row_of(params.softmax_lse, batch, head, first_row + warp_row0);
    RowNumbers<2 * Config::kWarpRows / 16> lse_log2;
#pragma unroll
    for (int r = 0; r < 2 * Config::kWarpRows / 16; ++r)
        lse_log2.x[r] = row0 + lane_row(r) < seq.seqlen_q ? lse_log2_of(ptx::load(lse + lane_row(r))) : ptx::infinity();
    Element* const probs = static_cast<Element*>(params.probs) +
                           (int64_t(batch) * p.num_heads + head) * p.seqlens.seqlen_q * p.seqlens.seqlen_k;
    for (int n = tiles.begin; n < tiles.end; ++n) {
        const int n0 = n * N;
        load_keys<Element, kThreads>(sK, p, p.k, batch, head / (p.num_heads / p.num_heads_k), seq, n0, p.head_dim);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::sync_threads();  // Q and K have landed: every thread's copies are visible
        AccTile<Config::kWarpRows, N> acc_s;
        acc_s.clear();
        mma_abt<Element>(acc_s, sQ, warp_row0, sK, 0);
        const QueryRows at{row0, n0};
        transform(acc_s, score, at);
        recompute_weights<false>(acc_s, lse_log2, score.scale_log2);
        mark_dropped(acc_s, score, at);
        acc_s.for_each([&](int r, int column, float x) {
            const int row = at.query(r, column), key = at.key(r, column);
            if (row >= seq.seqlen_q || key >= seq.seqlen_k) return;
            const uint32_t pair = mask.keep(row, key) ? ptx::pack<Element>(x, 0.f) : 0;
            ptx::store(probs + int64_t(row) * p.seqlens.seqlen_k + key, Element{uint16_t(pair)});
        });
        ptx::sync_threads();  // all warps have finished reading K
    }
}

}  // namespace flash_attn
