// Tile shapes of the backward pass for compute capability 9.0, and where things lie in shared memory.
#pragma once
#include "cuda/ptx/shared.h"
#include "cuda/sm90/warp_specialize.h"
#include "cuda/tile/copy_sm90.h"
#include "cuda/tile/pipeline.h"

namespace flash_attn {

// Consumers own rows of dK and dV, 64 keys each, or, where those would not fit into their registers, columns: as many
// of all keys.
template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_> struct BwdConfigSm90 {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kBlockN = kBlockN_;
    static constexpr bool kOwnsColumns = kHeadDim > 128;
    static constexpr int kConsumers = kHeadDim == 192 ? 3 : 2, kThreads = (1 + kConsumers) * kWarpgroupThreads;
    static_assert(kOwnsColumns ? kHeadDim % (64 * kConsumers) == 0 : kBlockN == 64 * kConsumers);

    // A tile of dQ consists of as many blocks, of 64 rows, as there are consumers: half of all rows, or a share of the
    // columns. Consumers that own columns compute one each, others all of them, and take turns.
    static constexpr bool kDqHalvesRows = kBlockM == 128;
    static_assert(kBlockM == (kDqHalvesRows ? 128 : 64));
    static constexpr int kDqCols = kDqHalvesRows ? kHeadDim : kHeadDim / kConsumers;
    static constexpr int kDqBlockElements = 64 * kDqCols, kDqTileElements = kConsumers * kDqBlockElements;
    static constexpr int kDqTurns = kOwnsColumns ? kConsumers : 1;
    FA_DEVICE static constexpr int dq_row0(int block) { return kDqHalvesRows ? 64 * block : 0; }
    FA_DEVICE static constexpr int dq_column0(int block) { return kDqHalvesRows ? 0 : kDqCols * block; }
    // Element j of a thread, within a block, or, if it has all blocks one after another, within the tile: 16 bytes of
    // all threads, then the next.
    FA_DEVICE static constexpr int dq_element(int j) { return j / 4 * 4 * kWarpgroupThreads + j % 4; }

    using TileK = WideTile<kBlockN, kHeadDim>;     // V too
    using TileQ = WideTile<kBlockM, kHeadDim>;     // dO too
    using TileDs = WideTile<kBlockM, kBlockN>;     // two of them: of this step and the last, or P and dS
    static constexpr int kRowBytes = kBlockM * 4;  // one number per query
    static constexpr int kDqBytes = kOwnsColumns ? 0 : kDqTileElements * 4;
    static constexpr int kTileBytes = 2 * TileK::kBytes + 3 * TileQ::kBytes + 2 * TileDs::kBytes + kDqBytes;
    // dO has a second stage where there is room for it beside barriers and numbers, 2 KB at most.
    static constexpr int kStagesQ = 2, kStagesDout = kTileBytes + TileQ::kBytes + 2048 <= kSm90SmemBytes ? 2 : 1;
    using PipelineQ = Pipeline<kStagesQ>;
    using PipelineDout = Pipeline<kStagesDout>;
    static constexpr int kDqOffset = 2 * TileK::kBytes + (kStagesQ + kStagesDout) * TileQ::kBytes + 2 * TileDs::kBytes;
    static constexpr int kRowsOffset = kDqOffset + kDqBytes;
    static constexpr int kBarriersOffset = kRowsOffset + (kStagesQ + kStagesDout) * kRowBytes;
    static constexpr int kScanBytes = kStagesDout * (ptx::kMbarrierBytes + 4);
    static constexpr int kBarrierBytes = ptx::kMbarrierBytes + PipelineQ::kBytes + PipelineDout::kBytes + kScanBytes;
    static constexpr int kSmemBytes = kBarriersOffset + round_up(kBarrierBytes, 8) + 8 + 4 * kConsumers;
    static_assert(kSmemBytes <= kSm90SmemBytes);

    // Rows of dK and dV that are stored at a time.
    static constexpr int kOutRows = kOwnsColumns ? kBlockN : kWarpgroupRows;

    // Of the kernels before and after the main one. The one after has as many threads as there are consumers.
    using TileOut = WideTile<kBlockM, kHeadDim>;
    static constexpr int kPreprocessThreads = kBlockM / 16 * kWarpThreads, kPreprocessSmemBytes = 2 * TileOut::kBytes;
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
    TileK k, v;
    ptx::SmemPtr k_restored;                  // completes whenever K has come again after the first time
    typename Config::PipelineQ pipe_q;        // with softmax_lse
    typename Config::PipelineDout pipe_dout;  // with dsoftmax_sum

    FA_DEVICE explicit BwdSmemSm90(ptx::SmemPtr base)
        : k{base}, v{k.end()}, k_restored(base + Config::kBarriersOffset), pipe_q{k_restored + ptx::kMbarrierBytes},
          pipe_dout{pipe_q.end()} {}
    FA_DEVICE TileQ q(int stage) const { return {v.end() + stage * TileQ::kBytes}; }
    FA_DEVICE TileQ dout(int stage) const { return {v.end() + (Config::kStagesQ + stage) * TileQ::kBytes}; }
    FA_DEVICE TileDs ds(int i) const { return {dout(Config::kStagesDout).base + i * TileDs::kBytes}; }
    FA_DEVICE ptx::SmemPtr dq() const { return k.base + Config::kDqOffset; }
    FA_DEVICE ptx::SmemPtr lse_log2(int stage) const {
        return k.base + (Config::kRowsOffset + stage * Config::kRowBytes);
    }
    // Of the same stage, where both have as many.
    static constexpr int kDsoftmaxSumOffset = Config::kStagesQ * Config::kRowBytes;
    FA_DEVICE ptx::SmemPtr dsoftmax_sum(int stage) const { return lse_log2(stage) + kDsoftmaxSumOffset; }
    // Of each stage of dO: a barrier that completes when its tiles have been scanned, and a word, the result.
    FA_DEVICE ptx::SmemPtr scanned(int stage) const { return pipe_dout.end() + stage * ptx::kMbarrierBytes; }
    FA_DEVICE ptx::SmemPtr has_nonfinite(int stage) const { return scanned(Config::kStagesDout) + stage * 4; }

    // How often anything that is not finite was cleared for a consumer.
    FA_DEVICE ptx::SmemPtr times_cleared(int consumer) const { return first_query_tile() + (8 + 4 * consumer); }
    // Number of the first tile in the workspace, of the first head, which is needed too rarely to keep it in registers.
    FA_DEVICE void store_first_query_tile(int64_t tile) const {
        ptx::store_shared(first_query_tile(), static_cast<uint32_t>(tile));
        ptx::store_shared(first_query_tile() + 4, static_cast<uint32_t>(tile >> 32));
    }
    FA_DEVICE int64_t load_first_query_tile() const {
        uint32_t words[2];
        ptx::load_shared_8(words, first_query_tile());
        return static_cast<int64_t>(words[1]) << 32 | words[0];
    }

    // One thread. Q and dO are released by the warps that scan them as well.
    FA_DEVICE void init_barriers(int scan_warps) const {
        ptx::mbarrier_init(k_restored, 1);
        pipe_q.init(4 * Config::kConsumers + scan_warps);
        pipe_dout.init(4 * Config::kConsumers + scan_warps);
        for (int stage = 0; stage < Config::kStagesDout; ++stage) ptx::mbarrier_init(scanned(stage), 1);
        ptx::fence_mbarrier_init();
    }

private:
    FA_DEVICE ptx::SmemPtr first_query_tile() const { return k_restored + round_up(Config::kBarrierBytes, 8); }
};

// Barriers of a block, beside 0, that of all its threads.
struct BwdBarriersSm90 {
    static constexpr int kConsumers = 1;                                         // among all consumers
    FA_DEVICE static constexpr int group(int consumer) { return 2 + consumer; }  // among the threads of one
    static constexpr int kScanWarps = 5;
    FA_DEVICE static constexpr int ds(int stage) { return 6 + stage; }  // dS of that stage is complete
};

}  // namespace flash_attn
