// The forward pass, for one FA_ELEMENT and FA_HEAD_DIM.
#include "cuda/instances.h"
#include "cuda/launch.h"
#include "cuda/sm80/config.h"
#include "cuda/sm80/fwd.h"

namespace flash_attn::cuda {

template <class Element, int kHeadDim> const char* run_fwd_sm80(const FwdParams& params, const Device& device) {
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        return with_tiles<FwdTilesSm80<Element, kHeadDim>, Variant>(device, [&](auto config) {
            using Config = typename decltype(config)::type;
            const int64_t blocks = query_grid(params.problem, Config::kBlockM).num_blocks();
            return launch(fwd_sm80<Config, Variant>, blocks, Config::kThreads, Config::kSmemBytes, device, params);
        });
    });
}

template const char* run_fwd_sm80<FA_ELEMENT, FA_HEAD_DIM>(const FwdParams&, const Device&);

}  // namespace flash_attn::cuda
