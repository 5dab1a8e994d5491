// Consumers that own columns of head_dim of dK, dV and dQ: for head_dims where the dK and dV of 64 keys do not fit into
// a consumer's registers. Each computes the scores of its share of the keys. P and dS go through shared memory, since
// every consumer needs all of them. dK and dV are computed transposed, dV^T += dO^T P and dK^T += Q^T dS, so that the
// number of keys need not be a multiple of 64. dQ = dS K is added to the workspace from registers, 16 bytes at a time:
// there is no shared memory left for a bulk reduction.
#pragma once
#include "cuda/sm90/bwd_consumer.h"
#include "cuda/tile/smem_rows.h"
#include "cuda/tile/store_rows.h"
#include "cuda/tile/store_tile.h"

namespace flash_attn {

template <class Config, class Variant> class BwdColumnsSm90 : BwdConsumerSm90<Config, Variant> {
    using Base = BwdConsumerSm90<Config, Variant>;
    using Base::M, Base::N, Base::D;
    using Base::smem_, Base::params_, Base::tile_, Base::consumer_, Base::at_q_, Base::at_dout_;
    using typename Base::Element, typename Base::Tile;
    static constexpr int kPanels = Config::kDqCols / 64;  // panels of 64 columns per consumer
    static constexpr int kKeys = N / Config::kConsumers;  // keys whose scores it computes
    static_assert(M == kWarpgroupRows && kKeys % 8 == 0 && N % 16 == 0 && kPanels <= 2);
    using Numbers = RowNumbers<2>;

public:
    FA_DEVICE BwdColumnsSm90(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params) : Base(smem, params) {}

    FA_DEVICE void run() {
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
            acc_dk_[j].clear();
            acc_dv_[j].clear();
        }
        this->for_each_tile([&](int i, int m) { step(i, m); });
        this->for_each_cleared([&](const Tile& tile, int m, const Element* dout, int rows) {
            const auto attends = [&](int k, int column) { return tile.mask.keep(m * M + k, tile.n0 + column); };
#pragma unroll
            for (int j = 0; j < kPanels; ++j) {
                const int first_column = column0(j) + this->warp_row0();
                add_nonfinite_columns(acc_dv_[j], dout + first_column, params_.common.pass.dout.row_stride, rows,
                                      params_.common.pass.problem.head_dim_v - first_column, attends);
            }
        });
        store();
    }

private:
    // Processes query tile m of the i-th head.
    FA_DEVICE void step(int i, int m) {
        const typename Variant::Score score(params_.common.pass.problem, tile_.seq, tile_.batch, tile_.first_head + i);
        const int key0 = consumer_ * kKeys, row0 = this->warp_row0();
        const QueryRows at{m * M + row0, ptx::opaque(tile_.n0 + key0)};
        const bool is_full = tile_.is_full_block(m);
        const auto q = smem_.q(at_q_.stage), dout = smem_.dout(at_dout_.stage);
        AccTile<16, kKeys> acc_s, acc_dp;
        smem_.pipe_q.wait(at_q_);
        wgmma_abt<Element, D>(acc_s, q, 0, smem_.k, key0);
        smem_.pipe_dout.wait(at_dout_);
        wgmma_abt<Element, D>(acc_dp, dout, 0, smem_.v, key0);
        ptx::wgmma_wait<1>();  // S is complete, dP in flight
        pin_tile(acc_s);
        const Numbers lse_log2 = numbers(smem_.lse_log2(at_q_.stage), row0);
        const Numbers dsoftmax_sum = numbers(smem_.dsoftmax_sum(at_dout_.stage), row0);
        transform(acc_s, score, at);
        if (!is_full) {
            const auto& mask = tile_.fresh(params_).mask;
            apply_mask_by_edge(acc_s, window_of(mask), at);  // one after the other: registers
            hide_outside_ranges(acc_s, mask, at);
        }
        recompute_weights<Variant::kMasked>(acc_s, lse_log2, score.scale_log2);
        mark_dropped(acc_s, score, at);
        smem_.pipe_dout.wait(at_dout_);  // already complete: only ends the basic block, as in fwd.h
        ptx::wgmma_wait<0>();
        pin_tile(acc_dp);
        score_gradient<Variant::kMasked>(acc_s, acc_dp, dsoftmax_sum, lse_log2, score, at);
        const bool cleared = Variant::kMasked && !is_full && this->clear_if_nonfinite();

        const auto weights = smem_.ds(0), ds = smem_.ds(1);
        this->sync_consumers();  // all consumers have finished reading the previous P and dS
        store_shared<Element>(acc_s, weights, row0, key0);
        store_shared<Element>(acc_dp, ds, row0, key0);
        ptx::fence_proxy_async();  // P and dS are read by wgmma; lse_log2 and dsoftmax_sum overwritten by TMA
        this->sync_consumers();    // P and dS are complete
#pragma unroll
        for (int j = 0; j < kPanels; ++j) wgmma_atb<Element>(acc_dv_[j], dout, column0(j), weights);
        AccTile<16, 64> acc_dq;
        wgmma_ab<Element>(acc_dq, ds, 0, smem_.k, column0(0));
        ptx::wgmma_wait<1>();  // dV is complete, dQ in flight
        this->release(smem_.pipe_dout, at_dout_);
#pragma unroll
        for (int j = 0; j < kPanels; ++j) wgmma_atb<Element>(acc_dk_[j], q, column0(j), ds);
        ptx::wgmma_wait<kPanels>();  // the first panel of dQ is complete, dK in flight
        pin_tile(acc_dq);
        const DqAccum& accum = params_.common.accum;
        const int64_t dq_tile = smem_.load_first_query_tile() + m;  // relative to the first head
        wait_for_turn(i, dq_tile, m);
        float* const sums = dq_sums<Config>(accum, i, dq_tile) + consumer_ * Config::kDqBlockElements;
        add_dq(acc_dq, sums, 0);
        if constexpr (kPanels == 2) wgmma_ab<Element>(acc_dq, ds, 0, smem_.k, column0(1));
        ptx::wgmma_wait<0>();
        if constexpr (kPanels == 2) {
            pin_tile(acc_dq);
            add_dq(acc_dq, sums, 1);
        }
        pass_turn(i, dq_tile);
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
            pin_tile(acc_dk_[j]);
            pin_tile(acc_dv_[j]);
        }
        this->release(smem_.pipe_q, at_q_);
        if (Variant::kMasked && cleared) this->restore_keys();
    }

    FA_DEVICE static Numbers numbers(ptx::SmemPtr rows, int row0) {
        Numbers numbers;
        SmemRows<M>{rows}.get(numbers.x, row0);
        return numbers;
    }
    // Adds one panel of this consumer's block to the workspace.
    FA_DEVICE static void add_dq(const AccTile<16, 64>& dq, float* sums, int panel) {
        float* const mine = sums + fresh_thread_idx() % kWarpgroupThreads * 4;
#pragma unroll
        for (int j = 0; j < dq.kPerBlock; j += 4) {
            const float* const x = &dq.x[0][j];
            ptx::red_add_16(mine + Config::dq_element(panel * dq.kPerBlock + j), {x[0], x[1], x[2], x[3]});
        }
    }
    // Deterministic: waits until the preceding key tiles have added theirs.
    FA_DEVICE void wait_for_turn(int i, int64_t dq_tile, int m) const {
        if (!params_.common.pass.deterministic) return;
        const int32_t* const turn = dq_turns<Config>(params_.common.accum, i, dq_tile) + consumer_;
        if (this->is_leader()) ptx::wait_for_turn(turn, Tile(params_).turn(params_, m));
        this->sync_group();  // it is this consumer's turn to add
    }
    FA_DEVICE void pass_turn(int i, int64_t dq_tile) const {
        if (!params_.common.pass.deterministic) return;
        this->sync_group();  // every thread has added its part
        if (this->is_leader()) ptx::pass_turn(dq_turns<Config>(params_.common.accum, i, dq_tile) + consumer_);
    }

    // Stores dK and dV, staged in the shared memory of K and V.
    FA_DEVICE void store() {
        const BwdParams& pass = params_.common.pass;
#pragma unroll
        for (int j = 0; j < kPanels; ++j)
            acc_dk_[j].for_each([&](int, int, float& x) { x *= pass.problem.scalars.scale; });
        if (pass.problem.float_results) {
            store_partial(acc_dk_, pass.dk, pass.problem.head_dim);
            return store_partial(acc_dv_, pass.dv, pass.problem.head_dim_v);
        }
        this->sync_consumers();  // all consumers have finished reading K and V
        const int first_panel = consumer_ * kPanels;
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
            store_matrices_transposed(PackedTile<Element, 16, N>(acc_dk_[j]), smem_.k.panel(first_panel + j));
            store_matrices_transposed(PackedTile<Element, 16, N>(acc_dv_[j]), smem_.v.panel(first_panel + j));
        }
        ptx::fence_proxy_async();  // dK and dV are read by TMA
        this->sync_group();        // this consumer's columns are complete
        if (!this->is_leader()) return;
        const Tile tile(params_);
        const TmaRows dk = tile.key_rows(params_.dk), dv = tile.key_rows(params_.dv);
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
            dk.store_panel(smem_.k, first_panel + j, 0, tile.n0);
            dv.store_panel(smem_.v, first_panel + j, 0, tile.n0);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();  // TMA must have read shared memory before the block exits
    }

    // Stores this consumer's columns in fp32, from registers.
    FA_DEVICE void store_partial(const AccTile<16, N> (&acc)[kPanels], const TensorView& to, int columns) const {
        const Tile tile(params_);
        float* const rows = row_of<float>(to, tile.batch, tile.head_k, tile.seq.first_row_k + tile.n0);
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
            const int column = column0(j) + this->warp_row0();
            store_columns(acc[j], rows + column, to.row_stride, tile.seq.seqlen_k - tile.n0, columns - column);
        }
    }

    // First column of the consumer's j-th panel.
    FA_DEVICE int column0(int j) const { return Config::dq_column0(consumer_) + 64 * j; }

    AccTile<16, N> acc_dk_[kPanels], acc_dv_[kPanels];  // transposed: [64 columns of head_dim, keys]
};

}  // namespace flash_attn
