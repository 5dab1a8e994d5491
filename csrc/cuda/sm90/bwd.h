// Main kernel of the backward pass for compute capability 9.0: FlashAttention-3 (2024), section 3.1 and appendix B.1. A
// block owns a key tile of one head of K and V and loops over the query tiles of all query heads that share it. One
// producer warp loads them by TMA; two or three consumer warpgroups compute.
#pragma once
#include "cuda/ptx/grid.h"
#include "cuda/sm90/bwd_columns.h"
#include "cuda/sm90/bwd_keys.h"

namespace flash_attn {

// Prefetches into L2 the first tiles of the block that probably runs next on this SM. The blocks of a wave start
// together and would all wait for global memory at the same time.
template <class Config, class Variant> FA_DEVICE void prefetch_next_block(const BwdKernelParamsSm90& params) {
    const int64_t next = int64_t(ptx::block_idx()) + params.blocks_at_a_time;
    if (next >= params.order.grid.num_blocks()) return;
    const BwdTileSm90<Config, Variant> tile(params, static_cast<int>(next));
    if (tile.is_outside() || tile.tiles().empty()) return;
    const int m0 = tile.tiles().begin * Config::kBlockM;
    using TileK = typename Config::TileK;
    using TileQ = typename Config::TileQ;
    tile.key_rows(params.k).template prefetch<TileK>(tile.n0);
    tile.query_rows(params.q, tile.first_head).template prefetch<TileQ>(m0);
    tile.key_rows(params.v).template prefetch<TileK>(tile.n0);
    tile.query_rows(params.dout, tile.first_head).template prefetch<TileQ>(m0);
}

// The producer thread: loads Q and dO of every query tile. K shares the mbarrier of the first Q, and V that of the
// first dO, so that S = Q K^T can start before V has landed.
template <class Config, class Variant> FA_DEVICE void load_tiles(const BwdSmemSm90<Config>& smem,
                                                                 const BwdKernelParamsSm90& params,
                                                                 const BwdTileSm90<Config, Variant>& tile) {
    constexpr int M = Config::kBlockM, kStageBytes = Config::TileQ::kBytes + Config::kRowBytes;
    const Problem& p = params.common.pass.problem;
    const DqAccum& accum = params.common.accum;
    const int64_t first_tile = first_query_tile(p, M, tile.batch, tile.seq.first_row_q);
    typename Config::PipelineQ::Index at_q;
    typename Config::PipelineDout::Index at_dout;
    bool is_first = true;
#pragma unroll 1
    for (int i = 0; i < params.heads_per_key_head; ++i) {
        const int head = tile.first_head + i;
        const TmaRows q = tile.query_rows(params.q, head), dout = tile.query_rows(params.dout, head);
#pragma unroll 1  // the producer has 24 registers
        for (int m = tile.tiles().begin; m < tile.tiles().end; ++m) {
            if (!tile.sees(m)) continue;
            const int64_t row = dq_rows<Config>(accum, head, first_tile + m);
            const int key_bytes = is_first ? Config::TileK::kBytes : 0;
            const auto load_q = [&] {
                const ptx::SmemPtr full = smem.pipe_q.acquire(at_q, kStageBytes + key_bytes);
                if (is_first) tile.key_rows(params.k).load(smem.k, full, tile.n0);
                q.load(smem.q(at_q.stage), full, m * M);
                ptx::bulk_load(smem.lse_log2(at_q.stage), accum.lse_log2 + row, Config::kRowBytes, full);
            };
            const auto load_dout = [&] {
                const ptx::SmemPtr full = smem.pipe_dout.acquire(at_dout, kStageBytes + key_bytes);
                if (is_first) tile.key_rows(params.v).load(smem.v, full, tile.n0);
                dout.load(smem.dout(at_dout.stage), full, m * M);
                ptx::bulk_load(smem.dsoftmax_sum(at_dout.stage), accum.dsoftmax_sum + row, Config::kRowBytes, full);
            };
            // After the first tile dO is released before Q and is loaded first, unless it has fewer stages than Q.
            const bool q_first = Config::kStagesDout < Config::kStagesQ || is_first;
            if (q_first) load_q();
            load_dout();
            if (!q_first) load_q();
            is_first = false;
            at_q.advance(), at_dout.advance();
        }
    }
    if (!Config::kOwnsColumns) prefetch_next_block<Config, Variant>(params);
}

// The scan warps, the other three of the producer warpgroup: in masked blocks they search K, Q and dO for NaN and
// infinity, which a weight of 0 would not keep out of a product. K is scanned before consumers first read the result,
// because they may clear and restore it afterwards. Consumers wait for the result and fence before TMA overwrites the
// tiles, which also orders the reads of the scan warps.
template <class Config, class Variant>
FA_DEVICE void scan_tiles(const BwdSmemSm90<Config>& smem, const BwdKernelParamsSm90& params) {
    using Element = typename Config::Element;
    const BwdTileSm90<Config, Variant> tile(params);
    constexpr int kThreads = kScanWarps * kWarpThreads;
    const int thread = ptx::thread_idx() - kWarpThreads;
    typename Config::PipelineQ::Index at_q;
    typename Config::PipelineDout::Index at_dout;
    bool k_searched = false, k_nonfinite = false;
    for (int i = 0; i < params.heads_per_key_head; ++i)
        for (int m = tile.tiles().begin; m < tile.tiles().end; ++m) {
            if (!tile.sees(m)) continue;
            const bool is_full = tile.is_full_block(m);
            bool found = false;
            smem.pipe_q.wait(at_q);
            if (!is_full) {
                if (!k_searched) k_nonfinite = holds_nonfinite_share<Element, kThreads>(smem.k, thread);
                k_searched = true;
                found = k_nonfinite || holds_nonfinite_share<Element, kThreads>(smem.q(at_q.stage), thread);
            }
            smem.pipe_dout.wait(at_dout);
            if (!is_full) {
                found = found || holds_nonfinite_share<Element, kThreads>(smem.dout(at_dout.stage), thread);
                found = ptx::barrier_sync_or(BwdBarriersSm90::kScanWarps, kThreads, found);
                if (thread == 0) ptx::store_shared(smem.has_nonfinite(at_dout.stage), found);
            }
            if (thread == 0) ptx::mbarrier_arrive(smem.scanned(at_dout.stage));
            if (lane_id() == 0) {
                smem.pipe_dout.release(at_dout);
                smem.pipe_q.release(at_q);
            }
            at_q.advance(), at_dout.advance();
        }
}

template <class Config, class Variant> FA_KERNEL(Config::kThreads, 1)
bwd_sm90(FA_GRID_CONSTANT BwdKernelParamsSm90 params) {
    using Consumer =
        std::conditional_t<Config::kOwnsColumns, BwdColumnsSm90<Config, Variant>, BwdKeysSm90<Config, Variant>>;
    ptx::grid_launch_dependents();  // its blocks become resident only after all blocks of this kernel
    const BwdSmemSm90<Config> smem(ptx::smem());
    const BwdTileSm90<Config, Variant> tile(params);  // for the producer; the other roles recompute theirs: registers
    if (!tile.is_outside() && ptx::thread_idx() == 0) {
        smem.init_barriers(Variant::kMasked ? kScanWarps : 0);
        const int64_t first =
            first_query_tile(params.common.pass.problem, Config::kBlockM, tile.batch, tile.seq.first_row_q);
        for (int i = 0; i < Config::kConsumers; ++i) ptx::store_shared(smem.times_cleared(i), 0);
        smem.store_first_query_tile(tile.first_head * params.common.accum.num_tiles + first);
    }
    ptx::grid_wait();  // the preprocess kernel has written the workspace
    if (tile.is_outside()) return;
    ptx::sync_threads();  // mbarriers, times_cleared and first_query_tile are initialised
    // Inlined, however large it is: products of wgmma would not be asynchronous across a call.
    const auto consume = [&]() __attribute__((always_inline)) { Consumer(smem, params).run(); };
    warp_specialize<Config::kConsumers, Variant::kMasked>([&] { load_tiles<Config, Variant>(smem, params, tile); },
                                                          [&] { scan_tiles<Config, Variant>(smem, params); }, consume);
}

}  // namespace flash_attn
