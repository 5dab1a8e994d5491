// Compile-time configuration of the backward pass for compute capability 9.0, from one tile shape, and its shared
// memory layout.
#pragma once
#include "cuda/ptx/shared.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/warp_specialize.h"
#include "cuda/tile/copy_sm90.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/smem_plan.h"

namespace flash_attn {

template <class Element_, BwdShapeSm90 kShape> struct BwdConfigSm90 {
    using Element = Element_;
    static constexpr int kHeadDim = kShape.head_dim, kBlockM = kShape.block_m, kBlockN = kShape.block_n;
    static constexpr bool kOwnsColumns = kShape.owns_columns();
    static constexpr int kConsumers = kShape.consumers, kThreads = (1 + kConsumers) * kWarpgroupThreads;
    static_assert(kOwnsColumns ? kHeadDim % (64 * kConsumers) == 0 : kBlockN == 64 * kConsumers);

    // A dQ tile consists of kConsumers blocks of 64 rows: halves of the rows, or shares of the columns. Consumers that
    // own columns compute one block each; otherwise one consumer computes all blocks of a tile, and they alternate.
    static constexpr bool kDqHalvesRows = kBlockM == 128;
    static_assert(kBlockM == (kDqHalvesRows ? 128 : 64));
    static constexpr int kDqCols = kDqHalvesRows ? kHeadDim : kHeadDim / kConsumers;
    static constexpr cuda::WorkspaceShape kWorkspace = workspace_shape(kShape);
    static constexpr int kDqTileElements = kWorkspace.tile_elements, kDqTurns = kWorkspace.turns;
    static constexpr int kDqBlockElements = 64 * kDqCols;
    static_assert(kDqTileElements == kConsumers * kDqBlockElements);
    FA_DEVICE static constexpr int dq_row0(int block) { return kDqHalvesRows ? 64 * block : 0; }
    FA_DEVICE static constexpr int dq_column0(int block) { return kDqHalvesRows ? 0 : kDqCols * block; }
    // Offset of element j of a thread, within a block or, for a thread with all blocks, within the tile: consecutive
    // threads hold consecutive chunks of 16 bytes.
    FA_DEVICE static constexpr int dq_element(int j) { return j / 4 * 4 * kWarpgroupThreads + j % 4; }

    using TileK = WideTile<kBlockN, kHeadDim>;     // also V
    using TileQ = WideTile<kBlockM, kHeadDim>;     // also dO
    using TileDs = WideTile<kBlockM, kBlockN>;     // two: dS of this and the previous step, or P and dS
    static constexpr int kRowBytes = kBlockM * 4;  // one fp32 value per query

    template <int kStagesQ, int kStagesDout> struct Tiles {
        Place<TileK> k, v;
        Place<TileQ, kStagesQ> q;
        Place<TileQ, kStagesDout> dout;
        Place<TileDs, 2> ds;
    };
    // With a staging buffer for dQ on its way to the workspace.
    template <int kStagesQ, int kStagesDout> struct TilesAndDq {
        Tiles<kStagesQ, kStagesDout> tiles;
        float dq[kDqTileElements];
    };
    template <int kStagesQ, int kStagesDout> struct OnlyTiles { Tiles<kStagesQ, kStagesDout> tiles; };
    template <int kStagesQ, int kStagesDout> struct Plan {
        std::conditional_t<kOwnsColumns, OnlyTiles<kStagesQ, kStagesDout>, TilesAndDq<kStagesQ, kStagesDout>> large;
        float lse_log2[kStagesQ][kBlockM], dsoftmax_sum[kStagesDout][kBlockM];
        MbarrierPlace k_restored;
        Place<Pipeline<kStagesQ>> pipe_q;
        Place<Pipeline<kStagesDout>> pipe_dout;
        MbarrierPlace scanned[kStagesDout];
        uint32_t has_nonfinite[kStagesDout];
        int64_t first_query_tile;
        uint32_t times_cleared[kConsumers];
    };
    // dO gets a second stage if it fits.
    static constexpr int kStagesQ = 2, kStagesDout = sizeof(Plan<kStagesQ, 2>) <= kSm90SmemBytes ? 2 : 1;
    using PipelineQ = Pipeline<kStagesQ>;
    using PipelineDout = Pipeline<kStagesDout>;
    using Smem = Plan<kStagesQ, kStagesDout>;
    static_assert(are_multiples_of<kWideTileAlignment>(offsetof(Smem, large.tiles.v), offsetof(Smem, large.tiles.q),
                                                       offsetof(Smem, large.tiles.dout),
                                                       offsetof(Smem, large.tiles.ds)));
    static_assert(are_multiples_of<16>(offsetof(Smem, lse_log2), offsetof(Smem, dsoftmax_sum)));
    static_assert(are_multiples_of<ptx::kMbarrierBytes>(offsetof(Smem, pipe_q), offsetof(Smem, pipe_dout)));
    static constexpr int kSmemBytes = sizeof(Smem);
    static_assert(kSmemBytes <= kSm90SmemBytes);

    // Rows of dK and dV per TMA store.
    static constexpr int kOutRows = kOwnsColumns ? kBlockN : kWarpgroupRows;

    // For the preprocess and postprocess kernels. Postprocess uses as many threads as there are consumer threads.
    using TileOut = WideTile<kBlockM, kHeadDim>;
    static constexpr int kPreprocessThreads = kBlockM / 16 * kWarpThreads;
    struct PreprocessSmem { Place<TileOut> out, dout; };
    static constexpr int kPostprocessThreads = kConsumers * kWarpgroupThreads, kDqParts = 1, kDqVector = 4;
    static constexpr bool kPadsRows = true, kDpByWgmma = true, kOverlap = true;
    struct GridDq {
        using Acc = AccTile<16, kDqCols>;
        FA_DEVICE static int row0() { return dq_row0(postprocess_consumer()) + warp_id() % 4 * 16; }
    };
    FA_DEVICE static int postprocess_consumer() { return ptx::thread_idx() / kWarpgroupThreads; }
    FA_DEVICE static int dq_col0(int) { return dq_column0(postprocess_consumer()); }
    FA_DEVICE static int dq_thread() {
        return postprocess_consumer() * kDqBlockElements + ptx::thread_idx() % kWarpgroupThreads * 4;
    }
    FA_DEVICE static constexpr int dq_element(int, int, int j) { return dq_element(j); }
};

template <class Config> struct BwdSmemSm90 {
    using TileK = typename Config::TileK;
    using TileQ = typename Config::TileQ;
    using TileDs = typename Config::TileDs;
    using Smem = typename Config::Smem;
    TileK k, v;
    ptx::SmemPtr k_restored;                  // completes each time K has been reloaded
    typename Config::PipelineQ pipe_q;        // Q and lse_log2
    typename Config::PipelineDout pipe_dout;  // dO and dsoftmax_sum

    FA_DEVICE explicit BwdSmemSm90(ptx::SmemPtr base)
        : k{base}, v{base + offsetof(Smem, large.tiles.v)}, k_restored(base + offsetof(Smem, k_restored)),
          pipe_q{base + offsetof(Smem, pipe_q)}, pipe_dout{base + offsetof(Smem, pipe_dout)} {}
    FA_DEVICE TileQ q(int stage) const { return {from_v(offsetof(Smem, large.tiles.q)) + stage * TileQ::kBytes}; }
    FA_DEVICE TileQ dout(int stage) const { return {from_v(offsetof(Smem, large.tiles.dout)) + stage * TileQ::kBytes}; }
    FA_DEVICE TileDs ds(int i) const { return {at(offsetof(Smem, large.tiles.ds)) + i * TileDs::kBytes}; }
    FA_DEVICE ptx::SmemPtr dq() const { return at(offsetof(Smem, large.dq)); }
    FA_DEVICE ptx::SmemPtr lse_log2(int stage) const {
        return at(offsetof(Smem, lse_log2)) + stage * Config::kRowBytes;
    }
    // Valid for equal stages, if Q and dO have the same number of them.
    static constexpr int kDsoftmaxSumOffset = offsetof(Smem, dsoftmax_sum) - offsetof(Smem, lse_log2);
    FA_DEVICE ptx::SmemPtr dsoftmax_sum(int stage) const { return lse_log2(stage) + kDsoftmaxSumOffset; }
    // Per stage of dO: an mbarrier that completes when the tiles have been scanned, and a word with the result.
    FA_DEVICE ptx::SmemPtr scanned(int stage) const {
        return at(offsetof(Smem, scanned)) + stage * ptx::kMbarrierBytes;
    }
    FA_DEVICE ptx::SmemPtr has_nonfinite(int stage) const { return at(offsetof(Smem, has_nonfinite)) + stage * 4; }

    // How often nonfinite values have been cleared, counted per consumer.
    FA_DEVICE ptx::SmemPtr times_cleared(int consumer) const {
        return at(offsetof(Smem, times_cleared)) + 4 * consumer;
    }
    // First dQ tile in the workspace, for the first head: read too rarely to keep it in registers.
    FA_DEVICE void store_first_query_tile(int64_t tile) const {
        ptx::store_shared(first_query_tile(), static_cast<uint32_t>(tile));
        ptx::store_shared(first_query_tile() + 4, static_cast<uint32_t>(tile >> 32));
    }
    FA_DEVICE int64_t load_first_query_tile() const {
        uint32_t words[2];
        ptx::load_shared_8(words, first_query_tile());
        return static_cast<int64_t>(words[1]) << 32 | words[0];
    }

    // One thread. Scan warps also release Q and dO.
    FA_DEVICE void init_barriers(int scan_warps) const {
        ptx::mbarrier_init(k_restored, 1);
        pipe_q.init(4 * Config::kConsumers + scan_warps);
        pipe_dout.init(4 * Config::kConsumers + scan_warps);
        for (int stage = 0; stage < Config::kStagesDout; ++stage) ptx::mbarrier_init(scanned(stage), 1);
        ptx::fence_mbarrier_init();
    }

private:
    FA_DEVICE ptx::SmemPtr at(int offset) const { return k.base + offset; }
    // Bases of Q and dO are relative to V, so that the scan loop keeps the base of K in a register of its own.
    FA_DEVICE ptx::SmemPtr from_v(int offset) const { return v.base + (offset - int(offsetof(Smem, large.tiles.v))); }
    FA_DEVICE ptx::SmemPtr first_query_tile() const { return at(offsetof(Smem, first_query_tile)); }
};

// Named barriers of a block.
struct BwdBarriersSm90 {
    enum : int {
        kBlock = 0,      // all threads
        kConsumers = 1,  // all consumers
        kGroup = 2,      // one per consumer: its threads
        kScanWarps = 5,
        kDs = 6,  // one per stage: its dS is complete
    };
    FA_DEVICE static constexpr int group(int consumer) { return kGroup + consumer; }
    FA_DEVICE static constexpr int ds(int stage) { return kDs + stage; }
};

}  // namespace flash_attn
