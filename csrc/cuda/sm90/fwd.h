// Forward pass for compute capability 9.0: FlashAttention-3 (2024), algorithms 1 and 2. One producer warp loads tiles
// by TMA; two or three consumer warpgroups compute 64 queries each and loop over the key tiles from last to first.
// While the tensor cores compute P V of one key tile, the consumer computes the softmax of the next.
//
// Blocks are persistent (cuda/sm90/tile_queue.h): the producer starts loading the next query tile before the output of
// the current one is stored.
#pragma once
#include "cuda/attention/max_logits.h"
#include "cuda/attention/rows.h"
#include "cuda/attention/score_tile.h"
#include "cuda/attention/softmax.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/sync.h"
#include "cuda/sm90/fwd_config.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/store_rows.h"
#include "policy/variant.h"

namespace flash_attn {

struct FwdKernelParamsSm90 {
    FwdParams pass;
    TmaTensor q, k, v, out;  // boxes of 64, kBlockN, kBlockN and 64 rows; no out for partial results
    TileShares shares;
    FwdRepeats repeats;
};

// A work item of TileQueueSm90: a query tile. kEnd follows the last one, kPause the last one that is computed for the
// first time.
enum class FwdWorkKind : int { kEnd, kTile, kRepeat, kPause };
struct FwdWorkSm90 {
    Sequence seq;
    Range tiles;  // key tiles that it sees
    int m0, head, batch;
    int index;  // in TileOrder
    FwdWorkKind kind;

    FA_DEVICE bool is_end() const { return kind == FwdWorkKind::kEnd; }
};

// A work item with its sequence and mask.
template <class Config, class Variant> struct FwdTileSm90 : FwdWorkSm90 {
    static constexpr int N = Config::kBlockN;
    typename Variant::Mask mask;
    Range full;  // keys that all of its queries see, but for ranges

    FA_DEVICE FwdTileSm90(const FwdWorkSm90& work, const Problem& p)
        : FwdWorkSm90(work), mask(Variant::Mask::of(p, seq, batch, head)), full(window_of(mask).full_kv_range(rows())) {
    }
    FA_DEVICE FwdTileSm90(int index, const WorkTile& at, FwdWorkKind kind, const Problem& p)
        : FwdTileSm90({sequence_at(p, at.batch), {}, at.tile * Config::kBlockM, at.head, at.batch, index, kind}, p) {
        tiles = tiles_of(mask.kv_range(rows()), N);
    }
    FA_DEVICE Range rows() const { return {m0, m0 + Config::kBlockM}; }
    FA_DEVICE int head_k(const Problem& p) const { return head / (p.num_heads / p.num_heads_k); }
    FA_DEVICE bool is_outside() const { return m0 >= seq.seqlen_q; }  // the grid is sized for the longest sequence
    FA_DEVICE bool is_repeat() const { return Variant::kMasked && kind == FwdWorkKind::kRepeat; }
    FA_DEVICE bool is_full_block(int n) const { return is_full({n, n + 1}); }
    FA_DEVICE bool is_full_block() const { return is_full(tiles); }

private:
    // Ranges are read each time: the loop has no registers for what they leave of `full`.
    FA_DEVICE bool is_full(Range key_tiles) const {
        const Range keys{key_tiles.begin * N, key_tiles.end * N};
        return Variant::Mask::kHasRanges ? mask.is_full_block(rows(), keys) : full.contains(keys);
    }
};

// The producer thread: announces tiles and loads their Q, K and V.
template <class Config, class Variant> class FwdLoaderSm90 {
    using Tile = FwdTileSm90<Config, Variant>;
    static constexpr int N = Config::kBlockN;

public:
    FA_DEVICE FwdLoaderSm90(const FwdSmemSm90<Config>& smem, const FwdKernelParamsSm90& params)
        : smem_(smem), params_(params) {}

    FA_DEVICE void run() {
        const TileShares& shares = params_.shares;
        for (int64_t i = shares.first(); shares.has(i); i = shares.after(i))
            load(static_cast<int>(i), FwdWorkKind::kTile);
        if constexpr (Variant::kMasked) repeat();
        announce(FwdWorkKind::kEnd);
    }

private:
    FA_DEVICE void announce(FwdWorkKind kind) {
        FwdWorkSm90 work{};
        work.kind = kind;
        smem_.queue.announce(at_tile_, work);
    }
    // After all tiles: those whose V must be searched for NaN and infinity.
    FA_DEVICE void repeat() {
        announce(FwdWorkKind::kPause);
        ptx::mbarrier_wait(smem_.repeats_known(), 0);  // the repeat list is complete
        int32_t index = static_cast<int32_t>(params_.shares.order.grid.num_blocks());
        for (;;) {
            index = params_.repeats.take(smem_.repeats(), index);
            if (index == FwdRepeats::kNone) return;
            load(index, FwdWorkKind::kRepeat);
        }
    }
    // Loads in the order of use: the first K, whose stage is free before Q's, then Q, then the V and further K of the
    // visible key tiles, K one tile ahead of V.
    FA_DEVICE void load(int index, FwdWorkKind kind) {
        const Tile tile(index, params_.shares.order.at(index), kind, params_.pass.problem);
        if (tile.is_outside()) return;
        smem_.queue.template announce<FwdWorkSm90>(at_tile_, tile);
        const Sequence& seq = tile.seq;
        const int head_k = tile.head_k(params_.pass.problem);
        const TmaRows q(params_.q, tile.batch, tile.head, seq.first_row_q, seq.seqlen_q);
        const TmaRows k(params_.k, tile.batch, head_k, seq.first_row_k, seq.seqlen_k);
        const TmaRows v(params_.v, tile.batch, head_k, seq.first_row_k, seq.seqlen_k);
        const bool sees_keys = !tile.tiles.empty();
        const auto load_k = [&](int n) {
            k.load(smem_.k(at_k_.stage), smem_.pipe_k.acquire(at_k_, Config::TileK::kBytes), n * N);
            at_k_.advance();
        };
        if (sees_keys) load_k(tile.tiles.end - 1);
        // Without key tiles a tile ends as soon as Q's barrier completes: waiting later could miss a phase of out_left.
        if (!sees_keys) wait_until_out_left();
#pragma unroll
        for (int i = 0; i < Config::kConsumers; ++i, at_q_.advance()) {
            const ptx::SmemPtr full = smem_.pipe_q.acquire(at_q_, sees_keys ? Config::TileQ::kBytes : 0);
            if (sees_keys) q.load(smem_.q(at_q_.stage), full, tile.m0 + i * kWarpgroupRows);
        }
        if (sees_keys) wait_until_out_left();
        for (int n = tile.tiles.end - 1; n >= tile.tiles.begin; --n, at_v_.advance()) {
            const bool has_next = n > tile.tiles.begin;
            if (Config::kNextKFirst && has_next) load_k(n - 1);
            v.load(smem_.v(at_v_.stage), smem_.pipe_v.acquire(at_v_, Config::TileV::kBytes), n * N);
            if (!Config::kNextKFirst && has_next) load_k(n - 1);
        }
    }

    // Waits until the previous tile's output, staged over V, has been read; returns at once for the first tile.
    FA_DEVICE void wait_until_out_left() {
        if (Config::kOutApart) return;
        ptx::mbarrier_wait(smem_.out_left(), out_left_ ^ 1);
        out_left_ ^= 1;
    }

    const FwdSmemSm90<Config>& smem_;
    const FwdKernelParamsSm90& params_;
    Pipeline<1>::Index at_tile_;
    typename Config::PipelineQ::Index at_q_;
    typename Config::Stages::Index at_k_, at_v_;
    int out_left_ = 0;  // phase parity that this tile's output completes
};

// Ping-pong scheduling (FlashAttention-3, section 3.1): consumers issue their products in turns, so that the softmax of
// one overlaps with the products of another. At the start the last consumer admits the first one.
template <class Config> class PingPongSm90 {
public:
    FA_DEVICE explicit PingPongSm90(int consumer) : mine_(consumer), next_((consumer + 1) % Config::kConsumers) {
        if (Config::kPingPong && next_ == 0) pass();
    }
    FA_DEVICE void wait() const {
        if (Config::kPingPong) ptx::barrier_sync(FwdBarriersSm90::ping_pong(mine_), 2 * kWarpgroupThreads);
    }
    FA_DEVICE void pass() const {
        if (Config::kPingPong) ptx::barrier_arrive(FwdBarriersSm90::ping_pong(next_), 2 * kWarpgroupThreads);
    }
    // After the last products: matches the last consumer's final arrival.
    FA_DEVICE void finish() const {
        if (mine_ == 0) wait();
    }

private:
    int mine_, next_;
};

// A consumer: one of the warpgroups that compute.
template <class Config, class Variant> class FwdConsumerSm90 {
    using Element = typename Config::Element;
    using Tile = FwdTileSm90<Config, Variant>;
    static constexpr int N = Config::kBlockN;
    using Weights = PackedTile<Element, 16, N>;

public:
    FA_DEVICE FwdConsumerSm90(const FwdSmemSm90<Config>& smem, const FwdKernelParamsSm90& params)
        : smem_(smem), params_(params), consumer_(warpgroup_id() - 1), warp_row0_(ptx::uniform(warp_id() - 4) * 16),
          ping_pong_(consumer_) {
        for (int i = 0; i < consumer_; ++i) at_q_.advance();
    }

    FA_DEVICE void run() {
        smem_.queue.template for_each<FwdWorkSm90>([&](const FwdWorkSm90& work) {
            if (Variant::kMasked && work.kind == FwdWorkKind::kPause) {
                if (looks() && is_leader()) ptx::mbarrier_arrive(smem_.repeats_known());
                return;
            }
            const Tile tile(work, params_.pass.problem);
            const typename Variant::Score score(params_.pass.problem, tile.seq, tile.batch, tile.head);
            acc_o_.clear();
            OnlineSoftmax<2> softmax;
            smem_.pipe_q.wait(at_q_);
            if (tile.tiles.empty()) {
                release(smem_.pipe_q, at_q_);
            } else if (tile.is_repeat()) {
                attend_again(tile, score, softmax);
            } else {
                attend(tile, score, softmax);
            }
            store(tile, score, softmax);
#pragma unroll
            for (int i = 0; i < Config::kConsumers; ++i) at_q_.advance();
        });
        ping_pong_.finish();
        ptx::bulk_wait_read<0>();  // TMA must have read shared memory before the block exits
    }

private:
    FA_DEVICE void attend(const Tile& tile, const typename Variant::Score& score, OnlineSoftmax<2>& softmax) {
        int n = tile.tiles.end - 1;
        smem_.pipe_k.wait(at_k_);
        AccTile<16, N> acc_s;
        gemm_qk(acc_s);
        ptx::wgmma_wait<0>();
        keys_done(acc_s);
        update_softmax(acc_s, tile, score, softmax, n);
        Weights weights(acc_s);
        for (--n; n >= tile.tiles.begin; --n) {
            smem_.pipe_k.wait(at_k_);
            ping_pong_.wait();
            gemm_qk(acc_s);
            smem_.pipe_v.wait(at_v_);
            gemm_pv(weights);
            ping_pong_.pass();
            ptx::wgmma_wait<1>();  // S is complete, P V in flight
            keys_done(acc_s);
            update_softmax(acc_s, tile, score, softmax, n);
            // Waits for V early, to end the basic block: otherwise ptxas would hoist the wait for P V above the
            // softmax, and nothing would overlap with it.
            auto next_v = at_v_;
            next_v.advance();
            smem_.pipe_v.wait(next_v);
            ptx::wgmma_wait<0>();
            pin_tile(acc_o_);
            values_done();
            softmax.rescale(acc_o_);
            weights = Weights(acc_s);
        }
        release(smem_.pipe_q, at_q_);  // all products with Q are complete
        smem_.pipe_v.wait(at_v_);
        gemm_pv(weights);
        ptx::wgmma_wait<0>();
        pin_tile(acc_o_);
        values_done();
    }
    // A repeated tile: searches V for NaN and infinity before each product with it. Rare, so one step after the other.
    // A loop of its own, because extra branches would slow down the other one.
    FA_DEVICE void attend_again(const Tile& tile, const typename Variant::Score& score, OnlineSoftmax<2>& softmax) {
#pragma unroll 1
        for (int n = tile.tiles.end - 1; n >= tile.tiles.begin; --n) {
            AccTile<16, N> acc_s;
            smem_.pipe_k.wait(at_k_);
            gemm_qk(acc_s);
            ptx::wgmma_wait<0>();
            keys_done(acc_s);
            update_softmax(acc_s, tile, score, softmax, n);
            softmax.rescale(acc_o_);
            const bool cleared = clear_values(tile, n);
            const Weights weights(acc_s);  // read until the product is complete
            gemm_pv(weights);
            ptx::wgmma_wait<0>();
            pin_tile(acc_o_);
            if (cleared) add_nonfinite_values(tile, n);
            values_done();
        }
        release(smem_.pipe_q, at_q_);  // all products with Q are complete
    }

    // S = Q K^T
    FA_DEVICE void gemm_qk(AccTile<16, N>& acc_s) {
        wgmma_abt<Element, Config::kHeadDim>(acc_s, smem_.q(at_q_.stage), 0, smem_.k(at_k_.stage), 0);
    }
    FA_DEVICE void keys_done(AccTile<16, N>& acc_s) {
        pin_tile(acc_s);
        release(smem_.pipe_k, at_k_);
        at_k_.advance();
    }
    // Scores become weights: scale, mask, online softmax, dropout.
    FA_DEVICE void update_softmax(AccTile<16, N>& acc_s, const Tile& tile, const typename Variant::Score& score,
                                  OnlineSoftmax<2>& softmax, int n) const {
        const QueryRows at{tile.m0 + warp_row0_, n * N};
        transform(acc_s, score, at);
        if (!tile.is_full_block(n)) apply_mask_by_edge(acc_s, tile.mask, at);
        softmax.update_max(acc_s, score.scale_log2);
        softmax.exp_and_sum(acc_s, score.scale_log2);
        drop(acc_s, score, at);
    }
    // All consumers of a repeated tile: waits for V and zeroes NaN and infinity in it. Returns whether there were any.
    FA_DEVICE bool clear_values(const Tile& tile, int n) const {
        smem_.pipe_v.wait(at_v_);
        if (tile.is_full_block(n)) return false;
        constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;
        const int thread = ptx::thread_idx() - kWarpgroupThreads;
        const auto v = smem_.v(at_v_.stage);
        const bool found = holds_nonfinite_share<Element, kThreads>(v, thread);
        if (found) clear_nonfinite_share<Element, kThreads>(v, thread);
        ptx::fence_proxy_async();  // V is read by wgmma and overwritten by TMA
        return ptx::barrier_sync_or(FwdBarriersSm90::kConsumers, kThreads, found);  // V is finite
    }
    // O += P V
    FA_DEVICE void gemm_pv(const Weights& weights) { wgmma_ab<Element>(acc_o_, weights, smem_.v(at_v_.stage)); }
    FA_DEVICE void values_done() {
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

    // Stores out and softmax_lse of the tile.
    FA_DEVICE void store(const Tile& tile, const typename Variant::Score& score, OnlineSoftmax<2>& softmax) {
        const bool partial = params_.pass.problem.float_results;
        float lse[2];
        softmax.finish(acc_o_, kept_weight_scale(score), sink_of(params_.pass.problem.score, tile.head), lse);
        const int64_t first_row = tile.seq.first_row_q + tile.m0 + warp_row0_;
        const int valid_rows = tile.seq.seqlen_q - tile.m0 - warp_row0_;
        add_max_logit(params_.pass, tile.batch, tile.head, softmax, score, valid_rows);
        float* const softmax_lse = row_of(params_.pass.softmax_lse, tile.batch, tile.head, first_row);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (lane_id() % 4 == 0 && lane_row(r) < valid_rows) ptx::store(softmax_lse + lane_row(r), lse[r]);
        if (partial) store_partial(tile, first_row, valid_rows);

        const int barrier = FwdBarriersSm90::group(consumer_);
        if (Config::kOutApart) {
            ptx::bulk_wait_read<0>();
            ptx::barrier_sync(barrier, kWarpgroupThreads);  // TMA has read this warpgroup's previous output
        } else {
            constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;
            ptx::barrier_sync(FwdBarriersSm90::kConsumers, kThreads);  // all consumers have finished reading V
        }
        const PackedTile<Element, 16, Config::kHeadDimV> out(acc_o_);
        const auto tile_out = smem_.out(consumer_);
        store_matrices(out, tile_out, warp_row0_ % kWarpgroupRows);
        ptx::fence_proxy_async();  // the output is read by TMA
        const bool found = looks() && !tile.is_repeat() && row_holds_nonfinite(out);
        ptx::barrier_sync(barrier, kWarpgroupThreads);  // the output is complete
        if (!is_leader()) return;
        const TmaRows rows(params_.out, tile.batch, tile.head, tile.seq.first_row_q, tile.seq.seqlen_q);
        if (tile.is_repeat()) ptx::bulk_wait<0>();  // the tile's first output has been written
        if (!partial) rows.store(tile_out, 0, tile.m0 + consumer_ * kWarpgroupRows);
        ptx::bulk_commit();
        if (found && !tile.is_full_block()) put_repeat(tile);
        if (Config::kOutApart) return;
        ptx::bulk_wait_read<0>();  // TMA has read the output
        ptx::mbarrier_arrive(smem_.out_left());
    }
    // Stores out in fp32, from registers: too large for the staging buffer.
    FA_DEVICE void store_partial(const Tile& tile, int64_t first_row, int valid_rows) const {
        const TensorView& out = params_.pass.out;
        store_rows(acc_o_, row_of<float>(out, tile.batch, tile.head, first_row), out.row_stride, valid_rows,
                   params_.pass.problem.head_dim_v);
    }
    // Whether this warp searches its output for NaN and infinity: one warp per block does.
    FA_DEVICE bool looks() const { return Variant::kMasked && warp_row0_ == 0; }
    FA_DEVICE void put_repeat(const Tile& tile) const {
        const int32_t place =
            FwdRepeats::place(params_.pass.problem, tile.batch, tile.head, tile.seq.first_row_q, tile.m0);
        params_.repeats.put(smem_.repeats(), place, tile.index);
    }

    template <int kStages> FA_DEVICE static void release(const Pipeline<kStages>& pipe, StageIndex<kStages> at) {
        if (lane_id() == 0) pipe.release(at);
    }
    // The thread that issues its warpgroup's TMA stores, and waits for them.
    FA_DEVICE static bool is_leader() { return ptx::thread_idx() % kWarpgroupThreads == 0; }

    const FwdSmemSm90<Config>& smem_;
    const FwdKernelParamsSm90& params_;
    const int consumer_, warp_row0_;
    PingPongSm90<Config> ping_pong_;
    typename Config::PipelineQ::Index at_q_;
    typename Config::Stages::Index at_k_, at_v_;
    AccTile<16, Config::kHeadDimV> acc_o_;
};

template <class Config, class Variant> FA_KERNEL(Config::kThreads, 1)
fwd_sm90(FA_GRID_CONSTANT FwdKernelParamsSm90 params) {
    const FwdSmemSm90<Config> smem(ptx::smem());
    if (ptx::thread_idx() == 0) smem.init();
    ptx::sync_threads();  // mbarriers are initialised
    warp_specialize<Config::kConsumers, false>([&] { FwdLoaderSm90<Config, Variant>(smem, params).run(); }, [] {},
                                               [&] { FwdConsumerSm90<Config, Variant>(smem, params).run(); });
}

}  // namespace flash_attn
