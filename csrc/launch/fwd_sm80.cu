// The forward pass, for one FA_ELEMENT and FA_HEAD_DIM.
#include "kernels/fwd_sm80.h"
#include "launch/dispatch.h"
#include "launch/instances.h"
#include "launch/launch.h"

namespace flash_attn::cuda {

template <class Element, int kHeadDim> const char* run_fwd_sm80(const FwdParams& params, const Device& device) {
    const Problem& p = params.problem;
    return with_policies<FwdTilesSm80<Element, kHeadDim>>(p, device, [&](auto config, auto mask, auto scores) {
        using Config = typename decltype(config)::type;
        const auto kernel = fwd_sm80<Config, typename decltype(mask)::type, typename decltype(scores)::type>;
        const int64_t blocks = query_grid(p, Config::kBlockM).num_blocks();
        return launch(kernel, blocks, Config::kThreads, Config::kSmemBytes, device, params);
    });
}

template const char* run_fwd_sm80<FA_ELEMENT, FA_HEAD_DIM>(const FwdParams&, const Device&);

}  // namespace flash_attn::cuda
