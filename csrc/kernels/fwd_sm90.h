// Forward pass for compute capability 9.0: FlashAttention-3 (2024), algorithms 1 and 2. One warp loads tiles by TMA,
// and two or three warpgroups, the consumers, compute 64 queries each, walking over the tiles of keys from the last to
// the first. While the tensor cores multiply the weights of one tile with V, the consumer computes the weights of the
// next.
//
// A block works on tiles of queries until there are none left (kernels/tile_queue_sm90.h), and begins to load for the
// next before it has stored the last.
#pragma once
#include "attn/mask.h"
#include "attn/rows.h"
#include "attn/score_tile.h"
#include "attn/softmax.h"
#include "kernels/fwd_config_sm90.h"
#include "ptx/global.h"
#include "ptx/ldmatrix.h"
#include "ptx/sync.h"
#include "tile/inspect.h"

namespace flash_attn {

struct FwdKernelParamsSm90 {
    FwdParams pass;
    TmaTensor q, k, v, out;  // boxes of kBlockM, kBlockN, kBlockN and 64 rows
    TileShares shares;
};

// What is announced of a tile of queries (TileQueueSm90).
struct FwdWorkSm90 {
    Sequence seq;
    Range tiles;  // of keys that it sees
    int m0, head, batch;
    int is_tile;
};

// A tile of queries.
template <class Config, class Mask> struct FwdTileSm90 : FwdWorkSm90 {
    Mask mask;

    FA_DEVICE FwdTileSm90(const FwdWorkSm90& work, const Problem& p)
        : FwdWorkSm90(work), mask(make_mask<Mask>(seq.seqlen_q, seq.seqlen_k, p.window)) {}
    FA_DEVICE FwdTileSm90(const WorkTile& at, const Problem& p)
        : FwdTileSm90(
              {sequence_at(p.seqlens, p.paged_kv, at.batch), {}, at.tile * Config::kBlockM, at.head, at.batch, 1}, p) {
        tiles = tiles_of(mask.keys_of(rows()), Config::kBlockN);
    }
    FA_DEVICE Range rows() const { return {m0, m0 + Config::kBlockM}; }
    FA_DEVICE int head_k(const Problem& p) const { return head / (p.num_heads / p.num_heads_k); }
    FA_DEVICE bool is_outside() const { return m0 >= seq.seqlen_q; }  // sequences differ in length
    FA_DEVICE bool covered(int n) const {
        return mask.covers(rows(), {n * Config::kBlockN, (n + 1) * Config::kBlockN});
    }
};

// One thread: announces tiles, and loads for each the first K, for which there is room before there is for Q, then Q,
// then V and the other K of the tiles that it sees, K one tile ahead, which is how they are used.
template <class Config, class Mask>
FA_DEVICE void load_tiles(const FwdSmemSm90<Config>& smem, const FwdKernelParamsSm90& params) {
    constexpr int N = Config::kBlockN;
    Pipeline<1>::Index at_tile;
    typename Config::PipelineQ::Index at_q;
    typename Config::Stages::Index at_k, at_v;
    int out_left = 0;  // parity of the phase that this tile's output completes
    const TileShares& shares = params.shares;
    for (int64_t i = shares.first(); shares.has(i); i = shares.after(i)) {
        const FwdTileSm90<Config, Mask> tile(shares.order.at(static_cast<int>(i)), params.pass.problem);
        if (tile.is_outside()) continue;
        smem.queue.template announce<FwdWorkSm90>(at_tile, tile);
        const Sequence& seq = tile.seq;
        const int head_k = tile.head_k(params.pass.problem);
        const TmaRows q(params.q, tile.batch, tile.head, seq.first_row_q, seq.seqlen_q);
        const TmaRows k(params.k, tile.batch, head_k, seq.first_row_k, seq.seqlen_k);
        const TmaRows v(params.v, tile.batch, head_k, seq.first_row_k, seq.seqlen_k);
        const bool sees_keys = !tile.tiles.empty();
        const auto load_k = [&](int n) {
            k.load(smem.k(at_k.stage), smem.pipe_k.acquire(at_k, Config::TileK::kBytes), n * N);
            at_k.advance();
        };
        if (sees_keys) load_k(tile.tiles.end - 1);
        const ptx::SmemPtr q_full = smem.pipe_q.acquire(at_q, sees_keys ? Config::TileQ::kBytes : 0);
        if (sees_keys) q.load(smem.q(at_q.stage), q_full, tile.m0);
        at_q.advance();
        if (!Config::kOutApart) {
            ptx::mbarrier_wait(smem.out_left(), out_left ^ 1);  // of the tile before; at once for the first
            out_left ^= 1;
        }
        for (int n = tile.tiles.end - 1; n >= tile.tiles.begin; --n, at_v.advance()) {
            const bool has_next = n > tile.tiles.begin;
            if (Config::kNextKFirst && has_next) load_k(n - 1);
            v.load(smem.v(at_v.stage), smem.pipe_v.acquire(at_v, Config::TileV::kBytes), n * N);
            if (!Config::kNextKFirst && has_next) load_k(n - 1);
        }
    }
    smem.queue.announce(at_tile, FwdWorkSm90{});
}

// The other warps of the same warpgroup: clear what is not finite in V where the mask hides something, and say so.
template <class Config, class Mask>
FA_DEVICE void inspect_values(const FwdSmemSm90<Config>& smem, const FwdKernelParamsSm90& params) {
    constexpr int kThreads = kInspectors * kWarpThreads;
    const int thread = ptx::thread_idx() - kWarpThreads;
    typename Config::Stages::Index at;
    smem.queue.template for_each<FwdWorkSm90>([&](const FwdWorkSm90& work) {
        const FwdTileSm90<Config, Mask> tile(work, params.pass.problem);
        for (int n = tile.tiles.end - 1; n >= tile.tiles.begin; --n, at.advance()) {
            smem.pipe_v.wait(at);
            if (!tile.covered(n)) {
                using Element = typename Config::Element;
                bool found = holds_nonfinite_share<Element, kThreads>(smem.v(at.stage), thread);
                if (found) clear_nonfinite_share<Element, kThreads>(smem.v(at.stage), thread);
                ptx::fence_proxy_async();  // V is to be read by wgmma, and overwritten by TMA
                found = ptx::barrier_sync_or(FwdBarriersSm90::kInspectors, kThreads, found);
                if (thread == 0) ptx::store_shared(smem.found(at.stage), found);
            }
            if (thread == 0) ptx::mbarrier_arrive(smem.inspected(at.stage));
            if (lane_id() == 0) smem.pipe_v.release(at);
        }
    });
}

// Whose turn it is to issue products. The last consumer lets the first one begin.
template <class Config> class TurnsSm90 {
public:
    FA_DEVICE explicit TurnsSm90(int consumer) : mine_(consumer), next_((consumer + 1) % Config::kConsumers) {
        if (Config::kTakesTurns && next_ == 0) pass();
    }
    FA_DEVICE void take() const {
        if (Config::kTakesTurns) ptx::barrier_sync(FwdBarriersSm90::turn(mine_), 2 * kWarpgroupThreads);
    }
    FA_DEVICE void pass() const {
        if (Config::kTakesTurns) ptx::barrier_arrive(FwdBarriersSm90::turn(next_), 2 * kWarpgroupThreads);
    }
    // After the last turn, which the last consumer has passed on to the first.
    FA_DEVICE void finish() const {
        if (mine_ == 0) take();
    }

private:
    int mine_, next_;
};

// A consumer: one of the warpgroups that compute.
template <class Config, class Mask, class Scores> class FwdConsumerSm90 {
    using Element = typename Config::Element;
    using Tile = FwdTileSm90<Config, Mask>;
    static constexpr int N = Config::kBlockN;
    using Weights = PackedTile<Element, 16, N>;

public:
    FA_DEVICE FwdConsumerSm90(const FwdSmemSm90<Config>& smem, const FwdKernelParamsSm90& params)
        : smem_(smem), params_(params), consumer_(warpgroup_id() - 1), warp_row0_(ptx::uniform(warp_id() - 4) * 16),
          turns_(consumer_) {}

    FA_DEVICE void run() {
        smem_.queue.template for_each<FwdWorkSm90>([&](const FwdWorkSm90& work) {
            const Tile tile(work, params_.pass.problem);
            const Scores scores(params_.pass.problem, tile.batch, tile.head, tile.seq);
            acc_o_.clear();
            OnlineSoftmax<2> softmax;
            smem_.pipe_q.wait(at_q_);
            if (!tile.tiles.empty())
                attend(tile, scores, softmax);
            else
                release(smem_.pipe_q, at_q_);
            store(tile, scores, softmax);
            at_q_.advance();
        });
        turns_.finish();
        ptx::bulk_wait_read<0>();  // shared memory goes when the block ends
    }

private:
    FA_DEVICE void attend(const Tile& tile, const Scores& scores, OnlineSoftmax<2>& softmax) {
        int n = tile.tiles.end - 1;
        smem_.pipe_k.wait(at_k_);
        AccTile<16, N> acc_s;
        multiply_keys(acc_s);
        ptx::wgmma_wait<0>();
        keys_done(acc_s);
        bool covered = tile.covered(n);
        weigh(acc_s, tile, scores, softmax, n, covered);
        Weights weights(acc_s);
        for (--n; n >= tile.tiles.begin; --n) {
            smem_.pipe_k.wait(at_k_);
            turns_.take();
            multiply_keys(acc_s);
            const bool found = wait_for_values(covered);
            multiply_values(weights);
            turns_.pass();
            ptx::wgmma_wait<1>();  // the scores are there, the product with V goes on
            keys_done(acc_s);
            const bool previous_covered = covered;
            covered = tile.covered(n);
            weigh(acc_s, tile, scores, softmax, n, covered);
            // V of this tile, a little early: this ends the basic block, in which ptxas would hoist the wait for the
            // product above the softmax, and nothing would run beside it.
            auto next_v = at_v_;
            next_v.advance();
            smem_.pipe_v.wait(next_v);
            ptx::wgmma_wait<0>();
            values_done(tile, n + 1, !previous_covered && found);
            softmax.rescale(acc_o_);
            weights = Weights(acc_s);
        }
        release(smem_.pipe_q, at_q_);  // all products with Q are done
        const bool found = wait_for_values(covered);
        multiply_values(weights);
        ptx::wgmma_wait<0>();
        values_done(tile, n + 1, !covered && found);
    }

    // S = Q K^T
    FA_DEVICE void multiply_keys(AccTile<16, N>& acc_s) {
        wgmma_abt<Element, Config::kHeadDim>(acc_s, smem_.q(at_q_.stage), consumer_ * kWarpgroupRows,
                                             smem_.k(at_k_.stage), 0);
    }
    FA_DEVICE void keys_done(AccTile<16, N>& acc_s) {
        pin_tile(acc_s);
        release(smem_.pipe_k, at_k_);
        at_k_.advance();
    }
    // Scores become weights.
    FA_DEVICE void weigh(AccTile<16, N>& acc_s, const Tile& tile, const Scores& scores, OnlineSoftmax<2>& softmax,
                         int n, bool covered) const {
        const QueryRows at{tile.m0 + warp_row0_, n * N};
        scores.apply(acc_s, at);
        if (!covered) apply_mask_by_edge(acc_s, tile.mask, at);
        softmax.raise_max(acc_s, scores.scale_log2);
        softmax.weigh(acc_s, scores.scale_log2);
        if constexpr (Scores::kModified) scores.drop(acc_s, at);
    }
    // Returns whether there was anything in V that is not finite, and has been cleared.
    FA_DEVICE bool wait_for_values(bool covered) const {
        smem_.pipe_v.wait(at_v_);
        if (!Mask::kHidesKeys || covered) return false;
        ptx::mbarrier_wait(smem_.inspected(at_v_.stage), at_v_.parity);
        return ptx::load_shared(smem_.found(at_v_.stage)) != 0;
    }
    // O += P V
    FA_DEVICE void multiply_values(const Weights& weights) { wgmma_ab<Element>(acc_o_, weights, smem_.v(at_v_.stage)); }
    FA_DEVICE void values_done(const Tile& tile, int n, bool found) {
        pin_tile(acc_o_);
        if (Mask::kHidesKeys && found) add_nonfinite_values(tile, n);
        release(smem_.pipe_v, at_v_);
        at_v_.advance();
    }
    FA_DEVICE void add_nonfinite_values(const Tile& tile, int n) {
        const Problem& p = params_.pass.problem;
        const auto attends = [&](int r, int k) {
            return tile.mask.keep(tile.m0 + warp_row0_ + lane_row(r), n * N + k);
        };
        add_nonfinite_rows(acc_o_, row_of<Element>(p.v, tile.batch, tile.head_k(p), tile.seq.first_row_k + n * N),
                           p.v.row_stride, min(N, tile.seq.seqlen_k - n * N), p.head_dim_v, attends);
    }

    // Output and log-sum-exp of the tile.
    FA_DEVICE void store(const Tile& tile, const Scores& scores, OnlineSoftmax<2>& softmax) {
        float lse[2], weight_scale = 1.f;
        if constexpr (Scores::kModified) weight_scale = scores.dropout_scale;
        softmax.finish(acc_o_, weight_scale, lse);
        const int64_t first_row = tile.seq.first_row_q + tile.m0 + warp_row0_;
        const int valid_rows = tile.seq.seqlen_q - tile.m0 - warp_row0_;
        float* const softmax_lse = row_of(params_.pass.softmax_lse, tile.batch, tile.head, first_row);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (lane_id() % 4 == 0 && lane_row(r) < valid_rows) ptx::store(softmax_lse + lane_row(r), lse[r]);

        const int barrier = FwdBarriersSm90::group(consumer_);
        if (Config::kOutApart) {
            ptx::bulk_wait_read<0>();
            ptx::barrier_sync(barrier, kWarpgroupThreads);  // this warpgroup's last output has left shared memory
        } else {
            constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;
            ptx::barrier_sync(FwdBarriersSm90::kConsumers, kThreads);  // all are done with V
        }
        store_matrices(PackedTile<Element, 16, Config::kHeadDimV>(acc_o_), smem_.out, warp_row0_);
        ptx::fence_proxy_async();
        ptx::barrier_sync(barrier, kWarpgroupThreads);  // the output is there
        if (!is_leader()) return;
        const TmaRows rows(params_.out, tile.batch, tile.head, tile.seq.first_row_q, tile.seq.seqlen_q);
        rows.store(smem_.out, consumer_ * kWarpgroupRows, tile.m0 + consumer_ * kWarpgroupRows);
        ptx::bulk_commit();
        if (Config::kOutApart) return;
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive(smem_.out_left());
    }

    template <int kStages> FA_DEVICE static void release(const Pipeline<kStages>& pipe, StageIndex<kStages> at) {
        if (lane_id() == 0) pipe.release(at);
    }
    // The thread that stores for its warpgroup, and waits for what it has stored.
    FA_DEVICE static bool is_leader() { return ptx::thread_idx() % kWarpgroupThreads == 0; }

    const FwdSmemSm90<Config>& smem_;
    const FwdKernelParamsSm90& params_;
    const int consumer_, warp_row0_;
    TurnsSm90<Config> turns_;
    typename Config::PipelineQ::Index at_q_;
    typename Config::Stages::Index at_k_, at_v_;
    AccTile<16, Config::kHeadDimV> acc_o_;
};

template <class Config, class Mask, class Scores> FA_KERNEL(Config::kThreads, 1)
fwd_sm90(FA_GRID_CONSTANT FwdKernelParamsSm90 params) {
    const FwdSmemSm90<Config> smem(ptx::smem());
    if (ptx::thread_idx() == 0) smem.init_barriers(Mask::kHidesKeys ? kInspectors : 0);
    ptx::sync_threads();  // barriers are initialised
    run_roles<Config::kConsumers, Mask::kHidesKeys>([&] { load_tiles<Config, Mask>(smem, params); },
                                                    [&] { inspect_values<Config, Mask>(smem, params); },
                                                    [&] { FwdConsumerSm90<Config, Mask, Scores>(smem, params).run(); });
}

}  // namespace flash_attn
