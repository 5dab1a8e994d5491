// Tile shapes of the forward pass for compute capability 9.0, and where things lie in shared memory.
#pragma once
#include "cuda/sm90/fwd_repeats.h"
#include "cuda/sm90/tile_queue.h"
#include "cuda/sm90/warp_specialize.h"
#include "cuda/tile/copy_sm90.h"
#include "cuda/tile/pipeline.h"

namespace flash_attn {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kStages_>
struct FwdConfigSm90 {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_;
    static constexpr int kStages = kStages_, kConsumers = kBlockM / kWarpgroupRows;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
    static_assert(kConsumers == 2 || kConsumers == 3);
    static_assert(kStages >= 2);  // a consumer waits for the next V before it is done with this one
    // Ping-pong scheduling is worth it where softmax takes nearly as long as the products.
    static constexpr bool kPingPong = kHeadDim <= 128;
    // Whether the next K is asked for before V: both are needed at the same time, and this was measured to be quicker
    // (benchmarks/results/nvidia-h200, experiment 11).
    static constexpr bool kNextKFirst = kPingPong;

    // Queries and output of one consumer.
    using TileQ = WideTile<kWarpgroupRows, kHeadDim>;
    using TileK = WideTile<kBlockN, kHeadDim>;
    using TileV = WideTile<kBlockN, kHeadDimV>;
    using TileOut = WideTile<kWarpgroupRows, kHeadDimV>;
    using Stages = Pipeline<kStages>;
    static constexpr int kOutBytes = kConsumers * TileOut::kBytes;
    // Barriers: the queue's and the pipelines' and two more; and a word.
    static constexpr int kOtherBytes = TileQueueSm90::kBytes + Pipeline<2 * kConsumers>::kBytes + 2 * Stages::kBytes +
                                       round_up(2 * ptx::kMbarrierBytes + 4, 16);
    static constexpr int kLeastBytes =
        kConsumers * TileQ::kBytes + kStages * (TileK::kBytes + TileV::kBytes) + kOtherBytes;
    // Where there is room, the output has a place of its own; otherwise it takes that of V, which is the last that the
    // next tile needs.
    static constexpr bool kOutApart = kLeastBytes + kOutBytes <= kSm90SmemBytes;
    // A ring of tiles of queries: each consumer takes every kConsumers-th. With more room the next ones are loaded
    // while these are still in use.
    static constexpr bool kRoomForNextQ = kLeastBytes + kOutBytes + kConsumers * TileQ::kBytes <= kSm90SmemBytes;
    static constexpr int kSlotsQ = kRoomForNextQ ? 2 * kConsumers : kConsumers;
    using PipelineQ = Pipeline<kSlotsQ>;
    static constexpr int kKeysOffset = kSlotsQ * TileQ::kBytes, kValuesOffset = kKeysOffset + kStages * TileK::kBytes;
    static constexpr int kOutOffset = kValuesOffset + (kOutApart ? kStages * TileV::kBytes : 0);
    static constexpr int kSmemBytes =
        kLeastBytes + (kSlotsQ - kConsumers) * TileQ::kBytes + (kOutApart ? kOutBytes : 0);
    static_assert(kSmemBytes <= kSm90SmemBytes && (kOutApart || kOutBytes <= kStages * TileV::kBytes));
};

template <class Config> struct FwdSmemSm90 {
    using TileK = typename Config::TileK;
    using TileV = typename Config::TileV;
    using TileQ = typename Config::TileQ;
    using TileOut = typename Config::TileOut;
    TileQ first_q;
    TileQueueSm90 queue;
    typename Config::PipelineQ pipe_q;
    typename Config::Stages pipe_k, pipe_v;

    FA_DEVICE explicit FwdSmemSm90(ptx::SmemPtr base)
        : first_q{base}, queue{base + (Config::kSmemBytes - Config::kOtherBytes)}, pipe_q{queue.end()},
          pipe_k{pipe_q.end()}, pipe_v{pipe_k.end()} {}
    FA_DEVICE TileQ q(int slot) const { return {first_q.base + slot * TileQ::kBytes}; }
    FA_DEVICE TileOut out(int consumer) const {
        return {first_q.base + (Config::kOutOffset + consumer * TileOut::kBytes)};
    }
    FA_DEVICE TileK k(int stage) const { return {first_q.base + (Config::kKeysOffset + stage * TileK::kBytes)}; }
    FA_DEVICE TileV v(int stage) const { return {first_q.base + (Config::kValuesOffset + stage * TileV::kBytes)}; }
    // Completes when a tile's output has left the memory of V.
    FA_DEVICE ptx::SmemPtr out_left() const { return pipe_v.end(); }
    // Completes when all tiles are in the list that have to be computed again.
    FA_DEVICE ptx::SmemPtr repeats_known() const { return out_left() + ptx::kMbarrierBytes; }
    // Where the list begins (FwdRepeats).
    FA_DEVICE ptx::SmemPtr repeats() const { return repeats_known() + ptx::kMbarrierBytes; }

    // One thread.
    FA_DEVICE void init() const {
        constexpr int kWarps = 4 * Config::kConsumers;
        queue.init(kWarps);
        pipe_q.init(4);
        pipe_k.init(kWarps);
        pipe_v.init(kWarps);
        ptx::mbarrier_init(out_left(), Config::kConsumers);
        ptx::mbarrier_init(repeats_known(), 1);
        ptx::fence_mbarrier_init();
        ptx::store_shared(repeats(), uint32_t(FwdRepeats::kNone));
    }
};

// Barriers 1 to 7 of a block; 0 is that of all its threads.
struct FwdBarriersSm90 {
    // The consumer may issue its products.
    FA_DEVICE static constexpr int ping_pong(int consumer) { return 1 + consumer; }
    FA_DEVICE static constexpr int group(int consumer) { return 4 + consumer; }  // among the threads of a consumer
    static constexpr int kConsumers = 7;                                         // among all consumers
};

}  // namespace flash_attn
