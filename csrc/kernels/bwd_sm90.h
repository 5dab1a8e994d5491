// Main kernel of the backward pass for compute capability 9.0: FlashAttention-3 (2024), section 3.1 and appendix B.1. A
// block owns a tile of keys of one head of K and V and walks over the tiles of queries of all query heads that share
// it. One warp loads them by TMA; two warpgroups, the consumers, own 64 keys each.
//
// Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are in registers just as the
// products dV += P^T dO and dK += dS^T Q take them. Only dS passes through shared memory, for dQ = dS K, of which each
// consumer computes one block and has it added to the workspace by a bulk reduction.
#pragma once
#include "attn/mask.h"
#include "attn/rows.h"
#include "attn/softmax_bwd.h"
#include "kernels/bwd_config_sm90.h"
#include "kernels/bwd_preprocess.h"
#include "ptx/sync.h"
#include "tile/inspect.h"

namespace flash_attn {

struct BwdKernelParamsSm90 {
    BwdKernelParams common;
    TmaTensor q, k, v, dout;  // boxes of kBlockM, kBlockN, kBlockN and kBlockM rows
    TmaTensor dk, dv;         // of 64
    TileOrder order;
};

FA_DEVICE int heads_per_key_head(const Problem& p) { return p.num_heads / p.num_heads_k; }

// The tile of keys of a block, and which tiles of queries see it, for each of the heads that share it.
template <class Config, class Mask> struct BwdTileSm90 {
    int n0, head_k, batch, first_head;
    Sequence seq;
    Mask mask;

    // Computed anew wherever it is needed apart from the main loop: registers are short there.
    FA_DEVICE explicit BwdTileSm90(const BwdKernelParamsSm90& params) {
        const Problem& p = params.common.pass.problem;
        const WorkTile at = params.order.at(ptx::opaque(ptx::block_idx()));
        const int n = adds_backwards(params) ? at.tile : params.order.grid.num_tiles - 1 - at.tile;
        n0 = n * Config::kBlockN, head_k = at.head, batch = at.batch;
        first_head = head_k * heads_per_key_head(p);
        seq = sequence_at(p.seqlens, p.paged_kv, batch);
        mask = make_mask<Mask>(seq.seqlen_q, seq.seqlen_k, p.window);
    }
    FA_DEVICE Range tiles() const { return tiles_of(mask.rows_of(keys()), Config::kBlockM); }
    FA_DEVICE bool is_outside() const { return n0 >= seq.seqlen_k; }  // sequences differ in length
    FA_DEVICE Range keys() const { return {n0, n0 + Config::kBlockN}; }
    FA_DEVICE Range rows(int m) const { return {m * Config::kBlockM, (m + 1) * Config::kBlockM}; }
    FA_DEVICE bool covered(int m) const { return mask.covers(rows(m), keys()); }
    // Tiles of keys that are seen by a tile of queries add to its dQ, in a fixed order, in ascending order. Under a
    // mask in descending order: causal tiles of queries are seen by the tile on the diagonal first, which so need not
    // wait.
    FA_DEVICE static bool adds_backwards(const BwdKernelParamsSm90& params) {
        return Mask::kHidesKeys && params.common.pass.deterministic;
    }
    // How many tiles of keys come before this one. They belong to blocks with smaller indices, which start earlier, so
    // that waiting for them ends.
    FA_DEVICE int turn(const BwdKernelParamsSm90& params, int m) const {
        const Range seen = tiles_of(mask.keys_of(rows(m)), Config::kBlockN);
        const int n = n0 / Config::kBlockN;
        return adds_backwards(params) ? seen.end - 1 - n : n - seen.begin;
    }
};

// One thread: K and V, then of every tile of queries dO and Q. dO comes first because it is released first.
template <class Config, class Mask>
FA_DEVICE void load_tiles(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params) {
    constexpr int M = Config::kBlockM, kStageBytes = Config::TileQ::kBytes + Config::kRowBytes;
    const Problem& p = params.common.pass.problem;
    const BwdTileSm90<Config, Mask> tile(params);
    const DqAccum& accum = params.common.accum;
    const Sequence& seq = tile.seq;
    if (tile.tiles().empty()) return;
    ptx::mbarrier_arrive_expect_tx(smem.kv_full, 2 * Config::TileK::kBytes);
    TmaRows(params.k, tile.batch, tile.head_k, seq.first_row_k, seq.seqlen_k).load(smem.k, smem.kv_full, tile.n0);
    TmaRows(params.v, tile.batch, tile.head_k, seq.first_row_k, seq.seqlen_k).load(smem.v, smem.kv_full, tile.n0);
    const int64_t first_tile = first_dq_tile(p, M, tile.batch, seq.first_row_q);
    typename Config::Stages::Index at;
    for (int i = 0; i < heads_per_key_head(p); ++i) {
        const int head = tile.first_head + i;
        const TmaRows q(params.q, tile.batch, head, seq.first_row_q, seq.seqlen_q);
        const TmaRows dout(params.dout, tile.batch, head, seq.first_row_q, seq.seqlen_q);
        for (int m = tile.tiles().begin; m < tile.tiles().end; ++m, at.advance()) {
            const int64_t row = dq_rows<Config>(accum, head, first_tile + m);
            const ptx::SmemPtr dout_full = smem.pipe_dout.acquire(at, kStageBytes);
            dout.load(smem.dout(at.stage), dout_full, m * M);
            ptx::bulk_load(smem.dsoftmax_sum(at.stage), accum.dsoftmax_sum + row, Config::kRowBytes, dout_full);
            const ptx::SmemPtr q_full = smem.pipe_q.acquire(at, kStageBytes);
            q.load(smem.q(at.stage), q_full, m * M);
            ptx::bulk_load(smem.lse_log2(at.stage), accum.lse_log2 + row, Config::kRowBytes, q_full);
        }
    }
}

// The other warps of the same warpgroup: say whether anything in K, Q or dO is not finite where the mask hides
// something.
template <class Config, class Mask>
FA_DEVICE void inspect_tiles(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params) {
    using Element = typename Config::Element;
    const BwdTileSm90<Config, Mask> tile(params);
    constexpr int kThreads = kInspectors * kWarpThreads;
    const int thread = ptx::thread_idx() - kWarpThreads;
    if (tile.tiles().empty()) return;
    ptx::mbarrier_wait(smem.kv_full, 0);
    typename Config::Stages::Index at;
    for (int i = 0; i < heads_per_key_head(params.common.pass.problem); ++i)
        for (int m = tile.tiles().begin; m < tile.tiles().end; ++m, at.advance()) {
            smem.pipe_dout.wait(at);
            smem.pipe_q.wait(at);
            if (!tile.covered(m)) {
                bool found = holds_nonfinite_share<Element, kThreads>(smem.k, thread) ||
                             holds_nonfinite_share<Element, kThreads>(smem.dout(at.stage), thread) ||
                             holds_nonfinite_share<Element, kThreads>(smem.q(at.stage), thread);
                ptx::fence_proxy_async();  // Q and dO are to be overwritten by TMA
                found = ptx::barrier_sync_or(BwdBarriersSm90::kInspectors, kThreads, found);
                if (thread == 0) ptx::store_shared(smem.found(at.stage), found);
            }
            if (thread == 0) ptx::mbarrier_arrive(smem.inspected(at.stage));
            if (lane_id() == 0) {
                smem.pipe_dout.release(at);
                smem.pipe_q.release(at);
            }
        }
}

// A consumer: one of the warpgroups that compute.
template <class Config, class Mask, class Scores> class BwdConsumerSm90 {
    using Element = typename Config::Element;
    using Tile = BwdTileSm90<Config, Mask>;
    static constexpr int M = Config::kBlockM, D = Config::kHeadDim;
    using Packed = PackedTile<Element, 16, M>;
    using DqBlock = typename Config::GridDq::Acc;
    static constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;

public:
    FA_DEVICE BwdConsumerSm90(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params)
        : smem_(smem), params_(params), tile_(params), consumer_(warpgroup_id() - 1) {}

    FA_DEVICE void run() {
        acc_dk_.clear();
        acc_dv_.clear();
        if (!tile_.tiles().empty()) ptx::mbarrier_wait(smem_.kv_full, 0);
        for (int i = 0; i < heads_per_key_head(params_.common.pass.problem); ++i)
            for (int m = tile_.tiles().begin; m < tile_.tiles().end; ++m, at_.advance()) step(i, m);
        if (Mask::kHidesKeys && ptx::load_shared(smem_.found_any(consumer_)) != 0) add_nonfinite_numbers();
        store();
    }

private:
    // One tile of queries of the i-th head.
    FA_DEVICE void step(int i, int m) {
        const Scores scores(params_.common.pass.problem, tile_.batch, tile_.first_head + i, tile_.seq);
        const KeyRows at(m * M, tile_.n0 + warp_row0());
        const bool covered = tile_.covered(m);
        AccTile<16, M> acc_s, acc_dp;
        smem_.pipe_q.wait(at_);
        wgmma_abt<Element, D>(acc_s, smem_.k, consumer_ * kWarpgroupRows, smem_.q(at_.stage));
        smem_.pipe_dout.wait(at_);
        wgmma_abt<Element, D>(acc_dp, smem_.v, consumer_ * kWarpgroupRows, smem_.dout(at_.stage));
        ptx::wgmma_wait<1>();  // S is there, dP goes on
        pin_tile(acc_s);
        const ColumnNumbers lse_log2(smem_.lse_log2(at_.stage)), dsoftmax_sum(lse_log2, smem_.kDsoftmaxSumOffset);
        scores.apply(acc_s, at);
        if (!covered) apply_mask(acc_s, tile_.mask, at);
        recompute_weights<Mask::kHidesKeys>(acc_s, lse_log2, scores.scale_log2);
        if constexpr (Scores::kModified) scores.mark_dropped(acc_s, at);
        ptx::wgmma_wait<0>();
        pin_tile(acc_dp);
        score_gradient<Mask::kHidesKeys>(acc_s, acc_dp, dsoftmax_sum, lse_log2, scores, at);
        const bool found = Mask::kHidesKeys && !covered && wait_for_inspection();
        if (Mask::kHidesKeys && found) clear_nonfinite();

        const Packed weights(acc_s), ds(acc_dp);
        wgmma_ab<Element>(acc_dv_, weights, smem_.dout(at_.stage));
        store_matrices_transposed(ds, smem_.ds(at_.stage).panel(consumer_));
        ptx::fence_proxy_async();  // for dS, and for the numbers per query, which TMA will overwrite
        if (is_leader()) ptx::bulk_wait_read<0>();
        sync_consumers();  // dS is complete; the last dQ has left shared memory
        DqBlock acc_dq;
        wgmma_ab<Element>(acc_dq, smem_.ds(at_.stage), Config::dq_row0(consumer_), smem_.k,
                          Config::dq_column0(consumer_));
        ptx::wgmma_wait<1>();  // dV is done, dQ goes on
        release(smem_.pipe_dout);
        wgmma_ab<Element>(acc_dk_, ds, smem_.q(at_.stage));
        ptx::wgmma_wait<1>();  // dQ is done, dK goes on
        pin_tile(acc_dq);
        add_dq(acc_dq, i, m);
        ptx::wgmma_wait<0>();
        pin_tile(acc_dk_);
        pin_tile(acc_dv_);
        release(smem_.pipe_q);
        if (Mask::kHidesKeys && found) restore_keys();
    }

    // Adds this consumer's block to the workspace.
    FA_DEVICE void add_dq(const DqBlock& dq, int i, int m) {
        const ptx::SmemPtr block = smem_.dq(consumer_);
        const ptx::SmemPtr mine = block + int(fresh_thread_idx() % kWarpgroupThreads * 16);
#pragma unroll
        for (int j = 0; j < dq.kPerBlock; j += 4) {
            const float* const x = &dq.x[0][j];
            ptx::store_shared_16(mine + Config::dq_element(j) * 4, {ptx::float_bits(x[0]), ptx::float_bits(x[1]),
                                                                    ptx::float_bits(x[2]), ptx::float_bits(x[3])});
        }
        ptx::fence_proxy_async();
        ptx::barrier_sync(BwdBarriersSm90::group(consumer_), kWarpgroupThreads);  // the block is there
        if (!is_leader()) return;
        const DqAccum& accum = params_.common.accum;
        const bool in_turn = params_.common.pass.deterministic;
        const int64_t dq_tile = smem_.load_first_dq_tile() + m;  // counted from the first head
        int32_t* const turn = dq_turns<Config>(accum, i, dq_tile) + consumer_;
        if (in_turn) {
            ptx::wait_for_turn(turn, Tile(params_).turn(params_, m));
            ptx::fence_proxy_async_global();  // what others have added comes before what is added here
        }
        float* const sums = dq_sums<Config>(accum, i, dq_tile) + consumer_ * Config::kDqBlockElements;
        ptx::bulk_reduce_add(sums, block, Config::dq_block_bytes(consumer_));
        ptx::bulk_commit();
        if (!in_turn) return;
        ptx::bulk_wait<0>();  // it has been added
        ptx::fence_proxy_async_global();
        ptx::pass_turn(turn);
    }

    FA_DEVICE bool wait_for_inspection() const {
        ptx::mbarrier_wait(smem_.inspected(at_.stage), at_.parity);
        return ptx::load_shared(smem_.found(at_.stage)) != 0;
    }
    // Puts zeros in the place of what is not finite in Q, dO and K. Where Q is not finite, dS of what attends is not
    // either, and carries it to dK; what dO and K are to add to dV and dQ follows at the end.
    FA_DEVICE void clear_nonfinite() {
        const int thread = int(fresh_thread_idx()) - kWarpgroupThreads;
        if (is_leader()) ptx::store_shared(smem_.found_any(consumer_), 1);
        sync_consumers();  // all have multiplied with what is about to be cleared
        clear_nonfinite_share<Element, kThreads>(smem_.q(at_.stage), thread);
        clear_nonfinite_share<Element, kThreads>(smem_.dout(at_.stage), thread);
        clear_nonfinite_share<Element, kThreads>(smem_.k, thread);
        ptx::fence_proxy_async();
        sync_consumers();  // Q, dO and K are finite
    }
    // Adds what is not finite in dO and K to dV and dQ of what attends to it, for all tiles in which it was cleared.
    FA_DEVICE void add_nonfinite_numbers() {
        const BwdParams& pass = params_.common.pass;
        const Problem& p = pass.problem;
        const Tile tile(params_);
        const Sequence& seq = tile.seq;
        const int64_t first_tile = first_dq_tile(p, M, tile.batch, seq.first_row_q);
#pragma unroll 1
        for (int i = 0; i < heads_per_key_head(p); ++i)
#pragma unroll 1
            for (int m = tile.tiles().begin; m < tile.tiles().end; ++m) {
                if (tile.covered(m)) continue;
                const auto seen = [&](int r, int k) {
                    return tile.mask.keep(m * M + k, tile.n0 + warp_row0() + lane_row(r));
                };
                add_nonfinite_rows(acc_dv_,
                                   row_of<Element>(pass.dout, tile.batch, tile.first_head + i, seq.first_row_q + m * M),
                                   pass.dout.row_stride, min(M, seq.seqlen_q - m * M), p.head_dim_v, seen);
                add_nonfinite_keys(tile, m, dq_sums<Config>(params_.common.accum, tile.first_head + i, first_tile + m));
            }
    }
    FA_DEVICE void add_nonfinite_keys(const Tile& tile, int m, float* sums) const {
        const Problem& p = params_.common.pass.problem;
        const int row0 = m * M + Config::dq_row0(consumer_) + warp_row0() % kWarpgroupRows;
        const auto attends = [&](int r, int k) { return tile.mask.keep(row0 + lane_row(r), tile.n0 + k); };
        sums += consumer_ * Config::kDqBlockElements + ptx::thread_idx() % kWarpgroupThreads * 4;
#pragma unroll 1
        for (int column = 0; column < Config::kDqCols; column += 16) {
            const int first_column = Config::dq_column0(consumer_) + column;
            AccTile<16, 16> acc_dq;
            acc_dq.clear();
            add_nonfinite_rows(
                acc_dq, row_of<Element>(p.k, tile.batch, tile.head_k, tile.seq.first_row_k + tile.n0) + first_column,
                p.k.row_stride, min(Config::kBlockN, tile.seq.seqlen_k - tile.n0), p.head_dim - first_column, attends);
#pragma unroll
            for (int j = 0; j < acc_dq.kPerBlock; ++j)
                if (acc_dq.x[0][j] != 0.f) ptx::red_add(sums + Config::dq_element(column / 2 + j), acc_dq.x[0][j]);
        }
    }
    FA_DEVICE void restore_keys() {
        sync_consumers();  // all are done with the finite K
        const Problem& p = params_.common.pass.problem;
        const Tile tile(params_);
        load_tile<kThreads>(smem_.k, rows_from<Element>(p.k, tile.batch, tile.head_k, tile.seq.first_row_k + tile.n0),
                            tile.seq.seqlen_k - tile.n0, p.head_dim, ptx::thread_idx() - kWarpgroupThreads);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::fence_proxy_async();
        sync_consumers();  // K is what it was
    }

    // dK and dV, by way of the memory of K and V.
    FA_DEVICE void store() {
        const float scale = float(params_.common.pass.problem.score.softmax_scale);
        acc_dk_.for_each([&](int, int, float& x) { x *= scale; });
        sync_consumers();  // all are done with K; of V each has read its own rows only
        store_matrices(PackedTile<Element, 16, D>(acc_dk_), smem_.k, warp_row0());
        store_matrices(PackedTile<Element, 16, D>(acc_dv_), smem_.v, warp_row0());
        ptx::fence_proxy_async();
        ptx::barrier_sync(BwdBarriersSm90::group(consumer_), kWarpgroupThreads);  // this consumer's rows are there
        if (!is_leader()) return;
        const Tile tile(params_);
        const Sequence& seq = tile.seq;
        const int row0 = consumer_ * kWarpgroupRows;
        const TmaRows dk(params_.dk, tile.batch, tile.head_k, seq.first_row_k, seq.seqlen_k);
        const TmaRows dv(params_.dv, tile.batch, tile.head_k, seq.first_row_k, seq.seqlen_k);
        dk.store(smem_.k, row0, tile.n0 + row0);
        dv.store(smem_.v, row0, tile.n0 + row0);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();  // shared memory goes when the block ends
    }

    FA_DEVICE void release(const typename Config::Stages& pipe) const {
        if (lane_id() == 0) pipe.release(at_);
    }
    FA_DEVICE static void sync_consumers() { ptx::barrier_sync(BwdBarriersSm90::kConsumers, kThreads); }
    // The warp's first row of the tile of keys.
    FA_DEVICE static int warp_row0() { return int(fresh_thread_idx() / kWarpThreads - 4) * 16; }
    // The thread that stores for its warpgroup, and waits for what it has stored.
    FA_DEVICE static bool is_leader() { return ptx::thread_idx() % kWarpgroupThreads == 0; }

    const BwdSmemSm90<Config>& smem_;
    const BwdKernelParamsSm90& params_;
    const Tile tile_;
    const int consumer_;
    typename Config::Stages::Index at_;
    AccTile<16, D> acc_dk_, acc_dv_;
};

template <class Config, class Mask, class Scores> FA_KERNEL(Config::kThreads, 1)
bwd_sm90(FA_GRID_CONSTANT BwdKernelParamsSm90 params) {
    const BwdSmemSm90<Config> smem(ptx::smem());
    const BwdTileSm90<Config, Mask> tile(params);  // every role makes its own
    if (tile.is_outside()) return;
    if (ptx::thread_idx() == 0) {
        smem.init_barriers(Mask::kHidesKeys ? kInspectors : 0);
        const int64_t first =
            first_dq_tile(params.common.pass.problem, Config::kBlockM, tile.batch, tile.seq.first_row_q);
        for (int i = 0; i < Config::kConsumers; ++i) ptx::store_shared(smem.found_any(i), 0);
        smem.store_first_dq_tile(tile.first_head * params.common.accum.num_tiles + first);
    }
    ptx::sync_threads();  // barriers are initialised, and the number is there
    if (warpgroup_id() == 0) {
        ptx::reg_dealloc<producer_registers(Config::kConsumers)>();
        if (ptx::uniform(warp_id()) == 0) {
            if (ptx::elect_one()) load_tiles<Config, Mask>(smem, params);
        } else if (Mask::kHidesKeys) {
            inspect_tiles<Config, Mask>(smem, params);
        }
    } else {
        ptx::reg_alloc<consumer_registers(Config::kConsumers)>();
        BwdConsumerSm90<Config, Mask, Scores>(smem, params).run();
    }
}

}  // namespace flash_attn
