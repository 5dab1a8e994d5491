// Main kernel of the backward pass for compute capability 8.0 and later: FlashAttention-2, algorithm 2. A block owns a
// key tile of one head of K and V and loops over the query tiles of all query heads that share it, so dK and dV stay in
// registers and are summed in a fixed order. P and dS go through shared memory: dV and dK need them transposed, and
// every warp needs all of them. Q and dO have one buffer each: the next dO is loaded once dV is computed, the next Q
// once dK is.
#pragma once
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/softmax_bwd.h"
#include "cuda/sm80/bwd_config.h"
#include "cuda/tile/nonfinite.h"
#include "cuda/tile/store_rows.h"
#include "cuda/tile/store_tile.h"
#include "policy/variant.h"

namespace flash_attn {

// Adds one part of a dQ tile to the workspace.
template <class Config> FA_DEVICE void add_dq(const typename Config::GridDq::Acc& dq, float* sums) {
#pragma unroll
    for (int i = 0; i < dq.kRowBlocks; ++i)
#pragma unroll
        for (int j = 0; j < dq.kPerBlock; ++j) ptx::red_add(sums + Config::dq_element(0, i, j), dq.x[i][j]);
}

template <class Config, class Variant> FA_KERNEL(Config::kThreads, 1)
bwd_sm80(FA_GRID_CONSTANT BwdKernelParams params) {
    using Element = typename Config::Element;
    using GridS = typename Config::GridS;
    using GridDkv = typename Config::GridDkv;
    using GridDq = typename Config::GridDq;
    constexpr int M = Config::kBlockM, N = Config::kBlockN, kThreads = Config::kThreads;
    static_assert(kRangeTile % M == 0);
    const BwdParams& pass = params.pass;
    const Problem& p = pass.problem;
    const auto [n, head_k, batch] = key_grid(p, N).at(ptx::block_idx());
    const Sequence seq = sequence_at(p, batch);
    const int n0 = n * N;
    if (n0 >= seq.seqlen_k) return;
    const auto mask = Variant::Mask::of(p, seq, batch, head_k * (p.num_heads / p.num_heads_k));
    const Range tiles = tiles_of(mask.q_range({n0, n0 + N}), M);
    const int group = p.num_heads / p.num_heads_k;

    using Smem = typename Config::Smem;
    const ptx::SmemPtr smem = ptx::smem();
    const typename Config::TileK sK{smem + offsetof(Smem, k)}, sV{smem + offsetof(Smem, v)};
    const typename Config::TileQ sQ{smem + offsetof(Smem, q)}, sDout{smem + offsetof(Smem, dout)};
    const typename Config::TileS sP{smem + offsetof(Smem, p)}, sDS{smem + offsetof(Smem, ds)};
    const typename Config::Rows sLse{smem + offsetof(Smem, lse)}, sDsoftmaxSum{smem + offsetof(Smem, dsoftmax_sum)};
    const auto load_q = [&](int head, int m) {
        const int64_t row = seq.first_row_q + m * M;
        load_tile<kThreads>(sQ, rows_from<Element>(p.q, batch, head, row), seq.seqlen_q - m * M, p.head_dim);
        sLse.load(row_of(pass.softmax_lse, batch, head, row), seq.seqlen_q - m * M);
        ptx::cp_async_commit();
    };
    const auto load_dout = [&](int head, int m) {
        const int64_t row = seq.first_row_q + m * M;
        load_tile<kThreads>(sDout, rows_from<Element>(pass.dout, batch, head, row), seq.seqlen_q - m * M, p.head_dim_v);
        sDsoftmaxSum.load(row_of(pass.dsoftmax_sum, batch, head, row), seq.seqlen_q - m * M);
        ptx::cp_async_commit();
    };
    const auto load_k = [&] {
        const auto rows = rows_from<Element>(p.k, batch, head_k, seq.first_row_k + n0);
        load_tile<kThreads>(sK, rows, seq.seqlen_k - n0, p.head_dim);
        ptx::cp_async_commit();
    };

    typename GridDkv::Acc acc_dk, acc_dv;
    acc_dk.clear();
    acc_dv.clear();
    int head = head_k * group, m = tiles.begin;
    const int end_head = tiles.empty() ? head : head + group;
    // Moves on to a tile with queries that see some of the keys.
    const auto pass_over_unseen = [&](int& head, int& m) {
        while (head < end_head && !mask.sees({m * M, m * M + M}, {n0, n0 + N}))
            if (++m == tiles.end) m = tiles.begin, ++head;
    };
    pass_over_unseen(head, m);
    if (head < end_head) {
        load_k();
        const auto rows = rows_from<Element>(p.v, batch, head_k, seq.first_row_k + n0);
        load_tile<kThreads>(sV, rows, seq.seqlen_k - n0, p.head_dim_v);
        load_q(head, m);
        load_dout(head, m);
    }
    bool k_searched = false, k_nonfinite = false;
    while (head < end_head) {
        const int m0 = m * M;
        const QueryRows at{m0 + GridS::row0(), n0 + GridS::col0()};
        const Range rows{m0, m0 + M};
        const bool is_full = mask.template is_full_block<true>(rows, {n0, n0 + N});
        const typename Variant::Score score(p, seq, batch, head);
        ptx::cp_async_wait<0>();
        bool nonfinite = false;
        // K, V, Q and dO have landed: every thread's copies are visible. All warps have finished reading P and dS.
        if (Variant::kMasked && !is_full) {
            if (!k_searched) k_nonfinite = holds_nonfinite<Element, kThreads>(sK);
            k_searched = true;
            nonfinite = ptx::sync_threads_or(k_nonfinite || holds_nonfinite<Element, kThreads>(sQ) ||
                                             holds_nonfinite<Element, kThreads>(sDout));
        } else {
            ptx::sync_threads();
        }

        typename GridS::Acc acc_s, acc_dp;
        acc_s.clear();
        mma_abt<Element>(acc_s, sQ, GridS::row0(), sK, GridS::col0());
        transform(acc_s, score, at);
        if (!is_full) apply_mask(acc_s, mask, at);
        RowNumbers<acc_s.kLaneRows> lse_log2, dsoftmax_sum;
        sLse.get(lse_log2.x, GridS::row0());
#pragma unroll
        for (int r = 0; r < acc_s.kLaneRows; ++r)
            lse_log2.x[r] = at.query(r, 0) < seq.seqlen_q ? lse_log2_of(lse_log2.x[r]) : ptx::infinity();
        recompute_weights<Variant::kMasked>(acc_s, lse_log2, score.scale_log2);
        mark_dropped(acc_s, score, at);
        acc_dp.clear();
        mma_abt<Element>(acc_dp, sDout, GridS::row0(), sV, GridS::col0());
        sDsoftmaxSum.get(dsoftmax_sum.x, GridS::row0());
        score_gradient<Variant::kMasked>(acc_s, acc_dp, dsoftmax_sum, lse_log2, score, at);
        store_shared<Element>(acc_s, sP, GridS::row0(), GridS::col0());
        store_shared<Element>(acc_dp, sDS, GridS::row0(), GridS::col0());
        ptx::sync_threads();  // P and dS are complete; all warps have computed S and dP

        if (Variant::kMasked && nonfinite) {
            const auto attends = [&](int r, int k) { return mask.keep(m0 + k, n0 + GridDkv::row0() + lane_row(r)); };
            add_nonfinite<Element>(acc_dv, sDout, GridDkv::col0(), attends);
            // A nonfinite Q makes dS of the pairs that see it nonfinite too, and dS carries it to dK.
            ptx::sync_threads();  // all warps have read the values that are cleared next
            clear_nonfinite<Element, kThreads>(sQ);
            clear_nonfinite<Element, kThreads>(sDout);
            ptx::sync_threads();  // Q and dO are finite
        }
        int next_m = m + 1 < tiles.end ? m + 1 : tiles.begin, next_head = m + 1 < tiles.end ? head : head + 1;
        pass_over_unseen(next_head, next_m);
        mma_atb<Element>(acc_dv, sP, GridDkv::row0(), sDout, GridDkv::col0());
        ptx::sync_threads();  // all warps have finished reading dO
        if (next_head < end_head) load_dout(next_head, next_m);
        mma_atb<Element>(acc_dk, sDS, GridDkv::row0(), sQ, GridDkv::col0());
        ptx::sync_threads();  // all warps have finished reading Q
        if (next_head < end_head) load_q(next_head, next_m);

        const int64_t dq_tile = first_query_tile(p, M, batch, seq.first_row_q) + m;
        float* const sums = dq_sums<Config>(params.accum, head, dq_tile) + Config::dq_thread();
        // Deterministic: key tiles add to dQ in ascending order. The blocks of the earlier tiles have smaller indices
        // and start earlier, so the wait cannot deadlock.
        int32_t* const turn = dq_turns<Config>(params.accum, head, dq_tile);
        if (pass.deterministic) {
            if (ptx::thread_idx() == 0) ptx::wait_for_turn(turn, n - tiles_of(mask.kv_range(rows), N).begin);
            ptx::sync_threads();  // it is this block's turn to add
        }
        if (Variant::kMasked && nonfinite) {
            const auto attends = [&](int r, int k) { return mask.keep(m0 + GridDq::row0() + lane_row(r), n0 + k); };
#pragma unroll 1
            for (int part = 0; part < Config::kDqParts; ++part) {
                typename GridDq::Acc acc_dq;
                acc_dq.clear();
                add_nonfinite<Element>(acc_dq, sK, Config::dq_col0(part), attends);
                add_dq<Config>(acc_dq, sums + Config::dq_element(part, 0, 0));
            }
            ptx::sync_threads();  // all warps have read the values that are cleared next
            clear_nonfinite<Element, kThreads>(sK);
            ptx::sync_threads();  // K is finite
        }
#pragma unroll 1
        for (int part = 0; part < Config::kDqParts; ++part) {
            typename GridDq::Acc acc_dq;
            acc_dq.clear();
            mma_ab<Element>(acc_dq, sDS, GridDq::row0(), sK, Config::dq_col0(part));
            add_dq<Config>(acc_dq, sums + Config::dq_element(part, 0, 0));
        }
        if (pass.deterministic) {
            ptx::sync_threads();  // every thread has added its part
            if (ptx::thread_idx() == 0) ptx::pass_turn(turn);
        }
        if (Variant::kMasked && nonfinite && next_head < end_head) {
            ptx::sync_threads();  // all warps have finished reading the cleared K
            load_k();
        }
        head = next_head;
        m = next_m;
    }

    const float scale = p.scalars.scale;
    acc_dk.for_each([&](int, int, float& x) { x *= scale; });
    const int64_t first_row = seq.first_row_k + n0 + GridDkv::row0();
    const int valid_rows = seq.seqlen_k - n0 - GridDkv::row0(), col0 = GridDkv::col0();
    with_result_row<Element>(p, pass.dk, batch, head_k, first_row, [&](auto* rows) {
        store_rows(acc_dk, rows + col0, pass.dk.row_stride, valid_rows, p.head_dim - col0);
    });
    with_result_row<Element>(p, pass.dv, batch, head_k, first_row, [&](auto* rows) {
        store_rows(acc_dv, rows + col0, pass.dv.row_stride, valid_rows, p.head_dim_v - col0);
    });
}

}  // namespace flash_attn
