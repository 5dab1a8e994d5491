// Compile-time configuration of the forward pass for compute capability 9.0, from one tile shape, and its shared memory
// layout.
#pragma once
#include "cuda/sm90/config.h"
#include "cuda/sm90/fwd_repeats.h"
#include "cuda/sm90/tile_queue.h"
#include "cuda/sm90/warp_specialize.h"
#include "cuda/tile/copy_sm90.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/smem_plan.h"

namespace flash_attn {

template <class Element_, FwdShapeSm90 kShape> struct FwdConfigSm90 {
    using Element = Element_;
    static constexpr int kHeadDim = kShape.head_dim, kHeadDimV = kShape.head_dim_v;
    static constexpr int kBlockM = kShape.block_m, kBlockN = kShape.block_n, kStages = kShape.stages;
    static constexpr int kConsumers = kBlockM / kWarpgroupRows, kThreads = (1 + kConsumers) * kWarpgroupThreads;
    static_assert(kConsumers == 2 || kConsumers == 3);
    static_assert(kStages >= 2);  // a consumer waits for the next V before it releases this one
    // Ping-pong scheduling pays off where softmax takes nearly as long as the products.
    static constexpr bool kPingPong = kHeadDim <= 128;
    // Whether the next K is loaded before V: both are needed at the same time, and this order was measured to be faster
    // (benchmarks/results/nvidia-h200, experiment 11).
    static constexpr bool kNextKFirst = kPingPong;

    // Q and output of one consumer.
    using TileQ = WideTile<kWarpgroupRows, kHeadDim>;
    using TileK = WideTile<kBlockN, kHeadDim>;
    using TileV = WideTile<kBlockN, kHeadDimV>;
    using TileOut = WideTile<kWarpgroupRows, kHeadDimV>;
    using Stages = Pipeline<kStages>;

    struct OutBesideV {
        Place<TileV, kStages> v;
        Place<TileOut, kConsumers> out;
    };
    union OutOverV {
        Place<TileV, kStages> v;
        Place<TileOut, kConsumers> out;
    };
    // Q slots form a ring; each consumer uses every kConsumers-th slot.
    template <int kSlots, class ValuesAndOut> struct Plan {
        Place<TileQ, kSlots> q;
        Place<TileK, kStages> k;
        ValuesAndOut values;
        alignas(16) Place<TileQueueSm90> queue;
        Place<Pipeline<kSlots>> pipe_q;
        Place<Stages> pipe_k, pipe_v;
        MbarrierPlace out_left, repeats_known;
        uint32_t repeats;
    };
    // If it fits, the output has a staging buffer of its own; otherwise it reuses that of V, the last buffer that the
    // next tile needs.
    static constexpr bool kOutApart = sizeof(Plan<kConsumers, OutBesideV>) <= kSm90SmemBytes;
    // If there is more room, the next Q is loaded while the current one is in use.
    static constexpr bool kRoomForNextQ = sizeof(Plan<2 * kConsumers, OutBesideV>) <= kSm90SmemBytes;
    static constexpr int kSlotsQ = kRoomForNextQ ? 2 * kConsumers : kConsumers;
    using PipelineQ = Pipeline<kSlotsQ>;
    using Smem = Plan<kSlotsQ, std::conditional_t<kOutApart, OutBesideV, OutOverV>>;
    static_assert(are_multiples_of<kWideTileAlignment>(offsetof(Smem, k), offsetof(Smem, values.v),
                                                       offsetof(Smem, values.out)));
    static_assert(are_multiples_of<ptx::kMbarrierBytes>(offsetof(Smem, pipe_q), offsetof(Smem, pipe_k),
                                                        offsetof(Smem, pipe_v)));
    static_assert(kOutApart || sizeof(OutOverV) == sizeof(Place<TileV, kStages>));
    static constexpr int kSmemBytes = sizeof(Smem);
    static_assert(kSmemBytes <= kSm90SmemBytes);
};

template <class Config> struct FwdSmemSm90 {
    using TileK = typename Config::TileK;
    using TileV = typename Config::TileV;
    using TileQ = typename Config::TileQ;
    using TileOut = typename Config::TileOut;
    using Smem = typename Config::Smem;
    ptx::SmemPtr base;
    TileQueueSm90 queue;
    typename Config::PipelineQ pipe_q;
    typename Config::Stages pipe_k, pipe_v;

    FA_DEVICE explicit FwdSmemSm90(ptx::SmemPtr base)
        : base(base), queue{base + offsetof(Smem, queue)}, pipe_q{base + offsetof(Smem, pipe_q)},
          pipe_k{base + offsetof(Smem, pipe_k)}, pipe_v{base + offsetof(Smem, pipe_v)} {}
    FA_DEVICE TileQ q(int slot) const { return {base + slot * TileQ::kBytes}; }
    FA_DEVICE TileK k(int stage) const { return {base + (int(offsetof(Smem, k)) + stage * TileK::kBytes)}; }
    FA_DEVICE TileV v(int stage) const { return {base + (int(offsetof(Smem, values.v)) + stage * TileV::kBytes)}; }
    FA_DEVICE TileOut out(int consumer) const {
        return {base + (int(offsetof(Smem, values.out)) + consumer * TileOut::kBytes)};
    }
    // Completes when TMA has read a tile's output from the memory of V.
    FA_DEVICE ptx::SmemPtr out_left() const { return base + offsetof(Smem, out_left); }
    // Completes when the repeat list is complete.
    FA_DEVICE ptx::SmemPtr repeats_known() const { return base + offsetof(Smem, repeats_known); }
    // Head of the repeat list (FwdRepeats).
    FA_DEVICE ptx::SmemPtr repeats() const { return base + offsetof(Smem, repeats); }

    // Called by one thread.
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

// Named barriers of a block.
struct FwdBarriersSm90 {
    enum : int {
        kBlock = 0,      // all threads
        kPingPong = 1,   // one per consumer: it may issue its products
        kGroup = 4,      // one per consumer: its threads
        kConsumers = 7,  // all consumers
    };
    FA_DEVICE static constexpr int ping_pong(int consumer) { return kPingPong + consumer; }
    FA_DEVICE static constexpr int group(int consumer) { return kGroup + consumer; }
};

}  // namespace flash_attn
