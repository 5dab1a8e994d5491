// Tile shapes of the forward pass for compute capability 9.0, and where things lie in shared memory.
#pragma once
#include "kernels/roles_sm90.h"
#include "kernels/tile_queue_sm90.h"
#include "tile/copy_sm90.h"
#include "tile/pipeline.h"

namespace flash_attn {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kStages_>
struct FwdConfigSm90 {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_;
    static constexpr int kStages = kStages_, kConsumers = kBlockM / kWarpgroupRows;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
    static_assert(kConsumers == 2 || kConsumers == 3);
    static_assert(kStages >= 2);  // a consumer waits for the next V before it is done with this one
    // Warpgroups issue their products in turn, so that the softmax of one runs beside the products of another: worth it
    // where softmax takes nearly as long.
    static constexpr bool kTakesTurns = kHeadDim <= 128;
    // Whether the next K is asked for before V: both are needed at the same time, and this is what turned out quicker
    // (benchmarks/results/nvidia-h200, experiment 11).
    static constexpr bool kNextKFirst = kTakesTurns;

    using TileQ = WideTile<kBlockM, kHeadDim>;
    using TileK = WideTile<kBlockN, kHeadDim>;
    using TileV = WideTile<kBlockN, kHeadDimV>;
    using TileOut = WideTile<kBlockM, kHeadDimV>;
    using Stages = Pipeline<kStages>;
    // Of the stages' V: a barrier that says it has been inspected, and a word that says what was found.
    static constexpr int kInspectionBytes = kStages * (ptx::kMbarrierBytes + 4);
    static constexpr int kOtherBytes = TileQueueSm90::kBytes + Pipeline<2>::kBytes + 2 * Stages::kBytes +
                                       round_up(ptx::kMbarrierBytes + kInspectionBytes, 16);
    static constexpr int kLeastBytes = TileQ::kBytes + kStages * (TileK::kBytes + TileV::kBytes) + kOtherBytes;
    // Where there is room, the output has a place of its own; otherwise it takes that of V, which is the last that the
    // next tile needs. With more room the next Q is loaded while this one is still in use.
    static constexpr bool kOutApart = kLeastBytes + TileOut::kBytes <= kSm90SmemBytes;
    static constexpr int kStagesQ = kLeastBytes + TileOut::kBytes + TileQ::kBytes <= kSm90SmemBytes ? 2 : 1;
    using PipelineQ = Pipeline<kStagesQ>;
    static constexpr int kKeysOffset = kStagesQ * TileQ::kBytes, kValuesOffset = kKeysOffset + kStages * TileK::kBytes;
    static constexpr int kOutOffset = kValuesOffset + (kOutApart ? kStages * TileV::kBytes : 0);
    static constexpr int kSmemBytes = kLeastBytes + (kStagesQ - 1) * TileQ::kBytes + (kOutApart ? TileOut::kBytes : 0);
    static_assert(kSmemBytes <= kSm90SmemBytes && (kOutApart || TileOut::kBytes <= kStages * TileV::kBytes));
};

template <class Config> struct FwdSmemSm90 {
    using TileK = typename Config::TileK;
    using TileV = typename Config::TileV;
    using TileQ = typename Config::TileQ;
    TileQ first_q;
    typename Config::TileOut out;
    TileQueueSm90 queue;
    typename Config::PipelineQ pipe_q;
    typename Config::Stages pipe_k, pipe_v;

    FA_DEVICE explicit FwdSmemSm90(ptx::SmemPtr base)
        : first_q{base}, out{base + Config::kOutOffset}, queue{base + (Config::kSmemBytes - Config::kOtherBytes)},
          pipe_q{queue.end()}, pipe_k{pipe_q.end()}, pipe_v{pipe_k.end()} {}
    FA_DEVICE TileQ q(int stage) const { return {first_q.base + stage * TileQ::kBytes}; }
    FA_DEVICE TileK k(int stage) const { return {first_q.base + (Config::kKeysOffset + stage * TileK::kBytes)}; }
    FA_DEVICE TileV v(int stage) const { return {first_q.base + (Config::kValuesOffset + stage * TileV::kBytes)}; }
    // Completes when a tile's output has left the memory of V.
    FA_DEVICE ptx::SmemPtr out_left() const { return pipe_v.end(); }
    FA_DEVICE ptx::SmemPtr inspected(int stage) const { return out_left() + (1 + stage) * ptx::kMbarrierBytes; }
    FA_DEVICE ptx::SmemPtr found(int stage) const { return inspected(Config::kStages) + stage * 4; }

    // One thread. V is released by the warps that inspect it as well.
    FA_DEVICE void init_barriers(int inspectors) const {
        constexpr int kWarps = 4 * Config::kConsumers;
        queue.init(kWarps + inspectors);
        pipe_q.init(kWarps);
        pipe_k.init(kWarps);
        pipe_v.init(kWarps + inspectors);
        for (int stage = 0; stage < Config::kStages; ++stage) ptx::mbarrier_init(inspected(stage), 1);
        ptx::mbarrier_init(out_left(), Config::kConsumers);
        ptx::fence_mbarrier_init();
    }
};

// Barriers 1 to 8 of a block; 0 is that of all its threads.
struct FwdBarriersSm90 {
    // It is the consumer's turn to issue products.
    FA_DEVICE static constexpr int turn(int consumer) { return 1 + consumer; }
    FA_DEVICE static constexpr int group(int consumer) { return 4 + consumer; }  // among the threads of a consumer
    static constexpr int kInspectors = 7;                                        // among those who inspect V
    static constexpr int kConsumers = 8;                                         // among all consumers
};

}  // namespace flash_attn
