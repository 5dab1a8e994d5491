// Consumers that own 64 keys each, rows of dK and dV. Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, so
// that P^T and dS^T are in registers just as the products dV += P^T dO and dK += dS^T Q take them. Only dS passes
// through shared memory, for dQ = dS K. The consumers take turns at computing dQ of a tile of queries, which they have
// added to the workspace by a bulk reduction. So dS and K are read from shared memory by one of them, and the other
// goes on without waiting.
#pragma once
#include "cuda/sm90/bwd_consumer.h"

namespace flash_attn {

template <class Config, class Variant> class BwdKeysSm90 : BwdConsumerSm90<Config, Variant> {
    using Base = BwdConsumerSm90<Config, Variant>;
    using Base::M, Base::D;
    using Base::smem_, Base::params_, Base::tile_, Base::consumer_, Base::at_q_;
    using typename Base::Element, typename Base::Tile;
    using Packed = PackedTile<Element, 16, M>;
    static constexpr int kDqParts = M / kWarpgroupRows;
    static_assert(Config::kConsumers == 2 && Config::kStagesQ == 2 && Config::kStagesDout == 2);

public:
    FA_DEVICE BwdKeysSm90(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params) : Base(smem, params) {}

    FA_DEVICE void run() {
        acc_dk_.clear();
        acc_dv_.clear();
        this->for_each_tile([&](int i, int m) {
            if (Variant::kMasked && !tile_.is_full_block(m))
                step<true>(i, m);
            else
                step<false>(i, m);
        });
        this->for_each_cleared([&](const Tile& tile, int m, const Element* dout, int rows) {
            const auto attends = [&](int r, int k) {
                return tile.mask.keep(m * M + k, tile.n0 + row0() + lane_row(r));
            };
            add_nonfinite_rows(acc_dv_, dout, params_.common.pass.dout.row_stride, rows,
                               params_.common.pass.problem.head_dim_v, attends);
        });
        store();
    }

private:
    // One tile of queries of the i-th head. kBlockMasked: the mask hides some of its pairs, which few tiles pay for.
    template <bool kBlockMasked> FA_DEVICE void step(int i, int m) {
        const typename Variant::Score score(params_.common.pass.problem, tile_.seq, tile_.batch, tile_.first_head + i);
        const KeyRows at(m * M, tile_.n0 + row0());
        const int stage = at_q_.stage;
        AccTile<16, M> acc_s, acc_dp;
        smem_.pipe_q.wait(at_q_);
        wgmma_abt<Element, D>(acc_s, smem_.k, consumer_ * kWarpgroupRows, smem_.q(stage), 0);
        smem_.pipe_dout.wait(this->at_dout());
        wgmma_abt<Element, D>(acc_dp, smem_.v, consumer_ * kWarpgroupRows, smem_.dout(stage), 0);
        ptx::wgmma_wait<1>();  // S is there, dP goes on
        pin_tile(acc_s);
        const ColumnNumbers lse_log2(smem_.lse_log2(stage)), dsoftmax_sum(lse_log2, smem_.kDsoftmaxSumOffset);
        transform(acc_s, score, at);
        if (kBlockMasked || (!Variant::kMasked && !tile_.is_full_block(m))) apply_mask_by_edge(acc_s, tile_.mask, at);
        recompute_weights<kBlockMasked>(acc_s, lse_log2, score.scale_log2);
        mark_dropped(acc_s, score, at);
        ptx::wgmma_wait<0>();
        pin_tile(acc_dp);
        score_gradient<kBlockMasked>(acc_s, acc_dp, dsoftmax_sum, lse_log2, score, at);
        const bool cleared = kBlockMasked && this->clear_if_nonfinite();

        const Packed weights(acc_s), ds(acc_dp);
        wgmma_ab<Element>(acc_dv_, weights, smem_.dout(stage));
        store_matrices_transposed(ds, smem_.ds(stage).panel(consumer_));
        ptx::fence_proxy_async();  // for dS, and for the numbers per query, which TMA will overwrite
        ptx::sync_warp();          // before one lane releases what all have read
        wgmma_ab<Element>(acc_dk_, ds, smem_.q(stage));
        const bool adds_dq = stage == consumer_;
        if (!adds_dq) hand_over_ds();
        ptx::wgmma_wait<1>();  // dV is done, dK goes on
        this->release(smem_.pipe_dout, this->at_dout());
        ptx::wgmma_wait<0>();
        pin_tile(acc_dk_);
        pin_tile(acc_dv_);
        this->release(smem_.pipe_q, at_q_);
        if (adds_dq) add_dq(i, m);
        ptx::converge();
        if (kBlockMasked && cleared) this->restore_keys();
    }

    // The barrier that says that dS is complete. Stages have one each: who arrives for one tile may be waiting for the
    // next before the other consumer has come to wait for the first.
    FA_DEVICE int ds_barrier() const { return BwdBarriersSm90::ds(at_q_.stage); }
    // This consumer's half of dS is there for the other one, and the last dQ has left shared memory.
    FA_DEVICE void hand_over_ds() const {
        ptx::bulk_wait_read<0>();
        ptx::barrier_arrive(ds_barrier(), Base::kThreads);
    }

    // dQ = dS K of a tile of queries, to the workspace.
    FA_DEVICE void add_dq(int i, int m) const {
        AccTile<16, D> dq[kDqParts];  // 64 rows each
        ptx::barrier_sync(ds_barrier(), Base::kThreads);
#pragma unroll
        for (int part = 0; part < kDqParts; ++part)
            wgmma_ab<Element>(dq[part], smem_.ds(at_q_.stage), part * kWarpgroupRows, smem_.k, 0);
        ptx::wgmma_wait<0>();
        const ptx::SmemPtr mine = smem_.dq() + int(fresh_thread_idx() % kWarpgroupThreads * 16);
#pragma unroll
        for (int part = 0; part < kDqParts; ++part) {
            pin_tile(dq[part]);
#pragma unroll
            for (int j = 0; j < dq[part].kPerBlock; j += 4) {
                const float* const x = &dq[part].x[0][j];
                ptx::store_shared_16(
                    mine + Config::dq_element(part * dq[part].kPerBlock + j) * 4,
                    {ptx::float_bits(x[0]), ptx::float_bits(x[1]), ptx::float_bits(x[2]), ptx::float_bits(x[3])});
            }
        }
        ptx::fence_proxy_async();
        this->sync_group();  // dQ is there
        if (!this->is_leader()) return;
        const DqAccum& accum = params_.common.accum;
        const bool in_turn = params_.common.pass.deterministic;
        const int64_t dq_tile = smem_.load_first_query_tile() + m;  // counted from the first head
        int32_t* const turn = dq_turns<Config>(accum, i, dq_tile);
        if (in_turn) {
            ptx::wait_for_turn(turn, Tile(params_).turn(params_, m));
            ptx::fence_proxy_async_global();  // what others have added comes before what is added here
        }
        ptx::bulk_reduce_add(dq_sums<Config>(accum, i, dq_tile), smem_.dq(), Config::kDqTileElements * 4);
        ptx::bulk_commit();
        if (!in_turn) return;
        ptx::bulk_wait<0>();  // it has been added
        ptx::pass_turn(turn);
    }

    // dV and dK, by way of the memory of V and K. The other consumer may be at its last dQ still, which takes K: dV
    // need not wait for that.
    FA_DEVICE void store() {
        store_rows_of(acc_dv_, smem_.v, params_.dv);  // of V each consumer has read its own rows only
        const float scale = params_.common.pass.problem.scalars.scale;
        acc_dk_.for_each([&](int, int, float& x) { x *= scale; });
        this->sync_consumers();  // all are done with K
        store_rows_of(acc_dk_, smem_.k, params_.dk);
        if (this->is_leader()) ptx::bulk_wait_read<0>();  // shared memory goes when the block ends
    }
    // This consumer's rows.
    FA_DEVICE void store_rows_of(const AccTile<16, D>& acc, typename Config::TileK staged, const TmaTensor& to) const {
        store_matrices(PackedTile<Element, 16, D>(acc), staged, row0());
        ptx::fence_proxy_async();
        this->sync_group();  // they are there
        if (!this->is_leader()) return;
        const Tile tile(params_);
        const int first_row = consumer_ * kWarpgroupRows;
        tile.key_rows(to).store(staged, first_row, tile.n0 + first_row);
        ptx::bulk_commit();
    }

    // The warp's first row of the tile of keys.
    FA_DEVICE int row0() const { return int(fresh_thread_idx() / kWarpThreads - 4) * 16; }

    AccTile<16, D> acc_dk_, acc_dv_;
};

}  // namespace flash_attn
