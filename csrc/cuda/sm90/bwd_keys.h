// Consumers that own 64 keys each: rows of dK and dV. Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, so
// that P^T and dS^T are in registers in the layout of the A operands of dV += P^T dO and dK += dS^T Q. Only dS goes
// through shared memory, for dQ = dS K. The consumers alternate in computing dQ of a query tile, which is added to the
// workspace by a bulk reduction. So only one of them reads dS and K from shared memory, and the other continues.
#pragma once
#include "cuda/sm90/bwd_consumer.h"
#include "cuda/tile/store_rows.h"

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
    // Processes query tile m of the i-th head. kBlockMasked: the mask hides some of its pairs, as in few tiles.
    template <bool kBlockMasked> FA_DEVICE void step(int i, int m) {
        const typename Variant::Score score(params_.common.pass.problem, tile_.seq, tile_.batch, tile_.first_head + i);
        const KeyRows at(m * M, tile_.n0 + row0());
        const int stage = at_q_.stage;
        AccTile<16, M> acc_s, acc_dp;
        smem_.pipe_q.wait(at_q_);
        wgmma_abt<Element, D>(acc_s, smem_.k, consumer_ * kWarpgroupRows, smem_.q(stage), 0);
        smem_.pipe_dout.wait(this->at_dout());
        wgmma_abt<Element, D>(acc_dp, smem_.v, consumer_ * kWarpgroupRows, smem_.dout(stage), 0);
        ptx::wgmma_wait<1>();  // S is complete, dP in flight
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
        ptx::fence_proxy_async();  // dS is read by wgmma; lse_log2 and dsoftmax_sum overwritten by TMA
        ptx::sync_warp();          // all lanes have read before one lane releases the stages
        wgmma_ab<Element>(acc_dk_, ds, smem_.q(stage));
        const bool adds_dq = stage == consumer_;
        if (!adds_dq) hand_over_ds();
        ptx::wgmma_wait<1>();  // dV is complete, dK in flight
        this->release(smem_.pipe_dout, this->at_dout());
        ptx::wgmma_wait<0>();
        pin_tile(acc_dk_);
        pin_tile(acc_dv_);
        this->release(smem_.pipe_q, at_q_);
        if (adds_dq) add_dq(i, m);
        ptx::converge();
        if (kBlockMasked && cleared) this->restore_keys();
    }

    // The barrier that signals that dS is complete. One per stage: a consumer may arrive for the next tile before the
    // other one waits for this one.
    FA_DEVICE int ds_barrier() const { return BwdBarriersSm90::ds(at_q_.stage); }
    // This consumer's half of dS is complete, and its previous dQ has left the staging buffer.
    FA_DEVICE void hand_over_ds() const {
        ptx::bulk_wait_read<0>();
        ptx::barrier_arrive(ds_barrier(), Base::kThreads);
    }

    // Computes dQ = dS K of a query tile and adds it to the workspace.
    FA_DEVICE void add_dq(int i, int m) const {
        AccTile<16, D> dq[kDqParts];                      // [64, D] each
        ptx::barrier_sync(ds_barrier(), Base::kThreads);  // both halves of dS are complete; the staging buffer is free
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
        ptx::fence_proxy_async();  // dQ is read by the bulk reduction
        this->sync_group();        // dQ is complete
        if (!this->is_leader()) return;
        const DqAccum& accum = params_.common.accum;
        const bool in_turn = params_.common.pass.deterministic;
        const int64_t dq_tile = smem_.load_first_query_tile() + m;  // relative to the first head
        int32_t* const turn = dq_turns<Config>(accum, i, dq_tile);
        if (in_turn) {
            ptx::wait_for_turn(turn, Tile(params_).turn(params_, m));
            ptx::fence_proxy_async_global();  // the preceding blocks' additions to dQ come first
        }
        ptx::bulk_reduce_add(dq_sums<Config>(accum, i, dq_tile), smem_.dq(), Config::kDqTileElements * 4);
        ptx::bulk_commit();
        if (!in_turn) return;
        ptx::bulk_wait<0>();  // the addition is complete
        ptx::pass_turn(turn);
    }

    FA_DEVICE void store() {
        const Problem& p = params_.common.pass.problem;
        acc_dk_.for_each([&](int, int, float& x) { x *= p.scalars.scale; });
        p.float_results ? store_partial() : store_by_tma();
        if (this->is_leader()) ptx::bulk_wait_read<0>();  // TMA must have read shared memory before the block exits
    }
    // Stores dV and dK, staged in the shared memory of V and K. The other consumer may still read K for its last dQ; dV
    // need not wait for that.
    FA_DEVICE void store_by_tma() const {
        store_rows_of(acc_dv_, smem_.v, params_.dv);  // each consumer reads only its own rows of V
        this->sync_consumers();                       // all consumers have finished reading K
        store_rows_of(acc_dk_, smem_.k, params_.dk);
    }
    // Stores this consumer's rows.
    FA_DEVICE void store_rows_of(const AccTile<16, D>& acc, typename Config::TileK staged, const TmaTensor& to) const {
        store_matrices(PackedTile<Element, 16, D>(acc), staged, row0());
        ptx::fence_proxy_async();  // the rows are read by TMA
        this->sync_group();        // the rows are complete
        if (!this->is_leader()) return;
        const Tile tile(params_);
        const int first_row = consumer_ * kWarpgroupRows;
        tile.key_rows(to).store(staged, first_row, tile.n0 + first_row);
        ptx::bulk_commit();
    }

    // Stores dV and dK in fp32, from registers.
    FA_DEVICE void store_partial() const {
        const BwdParams& pass = params_.common.pass;
        const Tile tile(params_);
        const int key = tile.n0 + row0(), valid_rows = tile.seq.seqlen_k - key;
        const int64_t row = tile.seq.first_row_k + key;
        store_rows(acc_dv_, row_of<float>(pass.dv, tile.batch, tile.head_k, row), pass.dv.row_stride, valid_rows,
                   pass.problem.head_dim_v);
        store_rows(acc_dk_, row_of<float>(pass.dk, tile.batch, tile.head_k, row), pass.dk.row_stride, valid_rows,
                   pass.problem.head_dim);
    }

    // First row of the warp within the key tile.
    FA_DEVICE int row0() const { return int(fresh_thread_idx() / kWarpThreads - 4) * 16; }

    AccTile<16, D> acc_dk_, acc_dv_;
};

}  // namespace flash_attn
