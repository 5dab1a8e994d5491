// The backward pass, for one FA_ELEMENT and FA_HEAD_DIM: three kernels, one after another.
#include "cuda/attention/bwd_postprocess.h"
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/place_workspace.h"
#include "cuda/instances.h"
#include "cuda/launch.h"
#include "cuda/sm80/bwd.h"
#include "cuda/sm80/config.h"

namespace flash_attn::cuda {

template <class Config, class Variant>
static const char* launch_bwd(const BwdParams& params, void* workspace, const Device& device) {
    const Problem& p = params.problem;
    const BwdKernelParams kernel_params{params, place_workspace(workspace, p, workspace_shape<Config>())};
    const int64_t query_blocks = query_grid(p, Config::kBlockM).num_blocks();
    const int64_t key_blocks = key_grid(p, Config::kBlockN).num_blocks();
    const auto main = bwd_sm80<Config, Variant>;
    const char* error = launch(bwd_preprocess<Config>, query_blocks, Config::kPreprocessThreads,
                               Config::kPreprocessSmemBytes, device, kernel_params);
    if (!error) error = launch(main, key_blocks, Config::kThreads, Config::kSmemBytes, device, kernel_params);
    if (!error)
        error = launch(bwd_postprocess<Config>, query_blocks, Config::kPostprocessThreads, 0, device, kernel_params);
    return error;
}

template <class Element, int kHeadDim>
const char* run_bwd_sm80(const BwdParams& params, void* workspace, const Device& device) {
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        return with_tiles<BwdTilesSm80<Element, kHeadDim>, Variant>(device, [&](auto config) {
            return launch_bwd<typename decltype(config)::type, Variant>(params, workspace, device);
        });
    });
}

template const char* run_bwd_sm80<FA_ELEMENT, FA_HEAD_DIM>(const BwdParams&, void*, const Device&);

}  // namespace flash_attn::cuda
