// Shared by the consumers of the backward pass for compute capability 9.0: their tile, the barriers between them, and
// the handling of NaN and infinity in hidden pairs.
//
// If the scan warps find NaN or infinity in K, Q or dO for a query tile, these are zeroed before the products. A
// nonfinite Q makes dS of the pairs that see it nonfinite, which carries it to dK. The contributions of dO to dV and of
// K to dQ are added at the end, from global memory.
#pragma once
#include "cuda/attention/softmax_bwd.h"
#include "cuda/sm90/bwd_tile.h"
#include "cuda/tile/scan.h"

namespace flash_attn {

template <class Config, class Variant> class BwdConsumerSm90 {
protected:
    using Element = typename Config::Element;
    using Tile = BwdTileSm90<Config, Variant>;
    static constexpr int M = Config::kBlockM, N = Config::kBlockN, D = Config::kHeadDim;
    static constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;

    FA_DEVICE BwdConsumerSm90(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params)
        : smem_(smem), params_(params), tile_(params), consumer_(warpgroup_id() - 1) {}

    // Calls step(i, m) for every query tile m of the i-th head.
    template <class Step> FA_DEVICE void for_each_tile(Step step) {
        for (int i = 0; i < params_.heads_per_key_head; ++i)
            for (int m = tile_.tiles().begin; m < tile_.tiles().end; ++m) {
                if (!tile_.sees(m)) continue;
                step(i, m);
                at_q_.advance(), at_dout_.advance();
            }
    }

    // For masked blocks: whether K, Q or dO of this query tile has nonfinite values, which it then zeroes.
    FA_DEVICE bool clear_if_nonfinite() const {
        ptx::mbarrier_wait(smem_.scanned(at_dout().stage), at_dout().parity);
        if (ptx::load_shared(smem_.has_nonfinite(at_dout().stage)) == 0) return false;
        const int thread = int(fresh_thread_idx()) - kWarpgroupThreads;
        sync_consumers();  // all consumers have read times_cleared and the values that are cleared next
        if (is_leader()) ptx::store_shared(smem_.times_cleared(consumer_), times_cleared() + 1);
        clear_nonfinite_share<Element, kThreads>(smem_.q(at_q_.stage), thread);
        clear_nonfinite_share<Element, kThreads>(smem_.dout(at_dout().stage), thread);
        clear_nonfinite_share<Element, kThreads>(smem_.k, thread);
        ptx::fence_proxy_async();  // the tiles are read by wgmma and overwritten by TMA
        sync_consumers();          // Q, dO and K are finite
        return true;
    }
    FA_DEVICE uint32_t times_cleared() const { return ptx::load_shared(smem_.times_cleared(consumer_)); }
    // Reloads K, after clear_if_nonfinite() and all products with K.
    FA_DEVICE void restore_keys() const {
        sync_consumers();  // all consumers have finished reading the cleared K
        if (consumer_ == 0 && is_leader()) {
            ptx::mbarrier_arrive_expect_tx(smem_.k_restored, Config::TileK::kBytes);
            Tile(params_).key_rows(params_.k).load(smem_.k, smem_.k_restored, tile_.n0);
        }
        ptx::mbarrier_wait(smem_.k_restored, (times_cleared() - 1) % 2);
    }
    // Calls f(tile, m, dO from its first row on, valid rows) for all query tiles that may have been cleared, and adds
    // their nonfinite K to dQ.
    template <class F> FA_DEVICE void for_each_cleared(F f) const {
        if (!Variant::kMasked || times_cleared() == 0) return;
        const BwdParams& pass = params_.common.pass;
        const Problem& p = pass.problem;
        const Tile tile(params_);
        const Sequence& seq = tile.seq;
        const int64_t first_tile = first_query_tile(p, M, tile.batch, seq.first_row_q);
#pragma unroll 1
        for (int i = 0; i < params_.heads_per_key_head; ++i)
#pragma unroll 1
            for (int m = tile.tiles().begin; m < tile.tiles().end; ++m) {
                if (tile.is_full_block(m)) continue;
                const int head = tile.first_head + i;
                f(tile, m, row_of<Element>(pass.dout, tile.batch, head, seq.first_row_q + m * M),
                  min(M, seq.seqlen_q - m * M));
                add_nonfinite_keys(tile, m, dq_sums<Config>(params_.common.accum, head, first_tile + m));
            }
    }

    // Adds the nonfinite values of a K tile to this consumer's block of a dQ tile.
    FA_DEVICE void add_nonfinite_keys(const Tile& tile, int m, float* sums) const {
        const Problem& p = params_.common.pass.problem;
        const int row0 = m * M + Config::dq_row0(consumer_) + warp_row0();
        const auto attends = [&](int r, int k) { return tile.mask.keep(row0 + lane_row(r), tile.n0 + k); };
        sums += consumer_ * Config::kDqBlockElements + ptx::thread_idx() % kWarpgroupThreads * 4;
#pragma unroll 1
        for (int column = 0; column < Config::kDqCols; column += 16) {
            const int first_column = Config::dq_column0(consumer_) + column;
            AccTile<16, 16> acc_dq;
            acc_dq.clear();
            add_nonfinite_rows(
                acc_dq, row_of<Element>(p.k, tile.batch, tile.head_k, tile.seq.first_row_k + tile.n0) + first_column,
                p.k.row_stride, min(N, tile.seq.seqlen_k - tile.n0), p.head_dim - first_column, attends);
#pragma unroll
            for (int j = 0; j < acc_dq.kPerBlock; ++j)
                if (acc_dq.x[0][j] != 0.f) ptx::red_add(sums + Config::dq_element(column / 2 + j), acc_dq.x[0][j]);
        }
    }

    // at_dout_, or at_q_ if they are equal: saves registers.
    FA_DEVICE auto at_dout() const {
        if constexpr (Config::kStagesDout == Config::kStagesQ)
            return at_q_;
        else
            return at_dout_;
    }
    template <class Pipe> FA_DEVICE static void release(const Pipe& pipe, typename Pipe::Index at) {
        if (lane_id() == 0) pipe.release(at);
    }
    FA_DEVICE static void sync_consumers() { ptx::barrier_sync(BwdBarriersSm90::kConsumers, kThreads); }
    FA_DEVICE void sync_group() const { ptx::barrier_sync(BwdBarriersSm90::group(consumer_), kWarpgroupThreads); }
    // First row of the warp within its warpgroup's 64.
    FA_DEVICE static int warp_row0() { return int(fresh_thread_idx() / kWarpThreads % 4) * 16; }
    // The thread that issues its warpgroup's TMA stores, and waits for them.
    FA_DEVICE static bool is_leader() { return ptx::thread_idx() % kWarpgroupThreads == 0; }

    const BwdSmemSm90<Config>& smem_;
    const BwdKernelParamsSm90& params_;
    const Tile tile_;
    const int consumer_;
    typename Config::PipelineQ::Index at_q_;
    typename Config::PipelineDout::Index at_dout_;
};

}  // namespace flash_attn
