// Forward pass for compute capability 8.0 and later: FlashAttention-2, algorithm 1. A block computes a query tile, each
// warp some of its rows, and loops over the key tiles from last to first. K and V have one buffer each: V is loaded
// during Q K^T, the next K during softmax and P V.
#pragma once
#include "cuda/attention/max_logits.h"
#include "cuda/attention/rows.h"
#include "cuda/attention/score_tile.h"
#include "cuda/attention/softmax.h"
#include "cuda/ptx/sync.h"
#include "cuda/sm80/fwd_config.h"
#include "cuda/tile/gemm_sm80.h"
#include "cuda/tile/nonfinite.h"
#include "cuda/tile/store_rows.h"
#include "policy/variant.h"

namespace flash_attn {

template <class Config, class Variant> FA_KERNEL(Config::kThreads, 1) fwd_sm80(FA_GRID_CONSTANT FwdParams params) {
    using Element = typename Config::Element;
    constexpr int M = Config::kBlockM, N = Config::kBlockN, D = Config::kHeadDim, kThreads = Config::kThreads;
    // Number of keys whose weights are computed at a time, just before their product: fewer keys need fewer registers,
    // but dropout draws random numbers for whole tiles.
    constexpr int kStepKeys = Variant::kModified ? N : min(N, 32);
    const Problem& p = params.problem;
    const TileGrid grid = query_grid(p, M);
    const auto [tile, head, batch] = grid.at(ptx::block_idx());
    const Sequence seq = sequence_at(p, batch);
    const int m0 = (grid.num_tiles - 1 - tile) * M;  // under a causal mask the last tiles have the most work
    if (m0 >= seq.seqlen_q) return;
    const Variant variant(p, seq, batch, head);
    const auto& mask = variant.mask;
    const auto& score = variant.score;
    const Range rows{m0, m0 + M};
    const Range tiles = tiles_of(mask.kv_range(rows), N);

    using Smem = typename Config::Smem;
    const ptx::SmemPtr smem = ptx::smem();
    const typename Config::TileQ sQ{smem + offsetof(Smem, q)};
    const typename Config::TileK sK{smem + offsetof(Smem, k)}, sV{smem + offsetof(Smem, v)};
    const int head_k = head / (p.num_heads / p.num_heads_k), warp_row0 = warp_id() * Config::kWarpRows;
    const auto load_k = [&](int n) {
        load_keys<Element, kThreads>(sK, p, p.k, batch, head_k, seq, n * N, p.head_dim);
        ptx::cp_async_commit();
    };
    const auto load_v = [&](int n) {
        load_keys<Element, kThreads>(sV, p, p.v, batch, head_k, seq, n * N, p.head_dim_v);
        ptx::cp_async_commit();
    };

    // The dropout mask is made anew for every tile: the loop has no registers for its fields.
    const auto drop_step = [&](auto& weights, const QueryRows& at) {
        if constexpr (Variant::kModified) {
            const int same_batch = ptx::opaque(batch);
            drop(weights, typename Variant::Score(p, sequence_at(p, same_batch), same_batch, head), at);
        }
    };

    AccTile<Config::kWarpRows, D> acc_o;
    acc_o.clear();
    OnlineSoftmax<acc_o.kLaneRows> softmax;
    if (!tiles.empty()) {
        const auto queries = rows_from<Element>(p.q, batch, head, seq.first_row_q + m0);
        load_tile<kThreads>(sQ, queries, seq.seqlen_q - m0, p.head_dim);
        load_k(tiles.end - 1);
    }
    for (int n = tiles.end - 1; n >= tiles.begin; --n) {
        const int n0 = n * N;
        const bool is_full = mask.is_full_block(rows, {n0, n0 + N});
        ptx::cp_async_wait<0>();
        ptx::sync_threads();  // K has landed, every thread's copies; all warps have finished reading the last V
        load_v(n);
        AccTile<Config::kWarpRows, N> acc_s;
        acc_s.clear();
        mma_abt<Element>(acc_s, sQ, warp_row0, sK, 0);

        ptx::cp_async_wait<0>();
        bool nonfinite = false;
        // V has landed: every thread's copies are visible. All warps have finished reading K.
        if (Variant::kMasked && !is_full)
            nonfinite = ptx::sync_threads_or(holds_nonfinite<Element, kThreads>(sV));
        else
            ptx::sync_threads();
        if (n > tiles.begin) load_k(n - 1);

        const QueryRows at{m0 + warp_row0, n0};
        transform(acc_s, score, at);
        if (!is_full) apply_mask(acc_s, mask, at);
        softmax.update_max(acc_s, score.scale_log2);
        softmax.rescale(acc_o);
        if (Variant::kMasked && nonfinite) {
            const auto attends = [&](int r, int k) {
                return mask.template keep<true>(ptx::opaque(at.row0) + lane_row(r), n0 + k);
            };
            add_nonfinite<Element>(acc_o, sV, 0, attends);
            ptx::sync_threads();  // all warps have read the values that are cleared next
            clear_nonfinite<Element, kThreads>(sV);
            ptx::sync_threads();  // V is finite
        }
#pragma unroll
        for (int i = 0; i < N / kStepKeys; ++i) {
            AccTile<Config::kWarpRows, kStepKeys> weights = acc_s.template columns<kStepKeys>(i);
            softmax.exp_and_sum(weights, score.scale_log2);
            drop_step(weights, QueryRows{at.row0, n0 + i * kStepKeys});
            mma_ab<Element>(acc_o, PackedTile<Element, Config::kWarpRows, kStepKeys>(weights), sV, i * kStepKeys);
        }
    }

    float lse[acc_o.kLaneRows];
    softmax.finish(acc_o, kept_weight_scale(score), sink_of(p.score, head), lse);
    const Sequence same_seq = sequence_at(p, ptx::opaque(batch));  // recomputed: saves registers in the loop
    const int64_t first_row = same_seq.first_row_q + m0 + warp_row0;
    const int valid_rows = same_seq.seqlen_q - m0 - warp_row0;
    add_max_logit(params, batch, head, softmax, score, valid_rows);
    with_result_row<Element>(p, params.out, batch, head, first_row, [&](auto* rows) {
        store_rows(acc_o, rows, params.out.row_stride, valid_rows, p.head_dim_v);
    });
    float* const softmax_lse = row_of(params.softmax_lse, batch, head, first_row);
#pragma unroll
    for (int r = 0; r < acc_o.kLaneRows; ++r)
        if (lane_id() % 4 == 0 && lane_row(r) < valid_rows) ptx::store(softmax_lse + lane_row(r), lse[r]);
}

}  // namespace flash_attn
