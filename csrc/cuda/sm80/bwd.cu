// The backward pass, for one FA_ELEMENT and FA_HEAD_DIM: three kernels, one after another.
#include "cuda/attention/bwd_postprocess.h"
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/place_workspace.h"
#include "cuda/instance.h"
#include "cuda/launch.h"
#include "cuda/sm80/bwd.h"
#include "cuda/sm80/with_smem.h"

namespace flash_attn::cuda {

template <class Config, class Variant>
static const char* launch_bwd(const BwdParams& params, void* workspace, const Device& device) {
    const Problem& p = params.problem;
    const BwdKernelParams kernel_params{params, place_workspace(workspace, p, Config::kWorkspace)};
    const int64_t query_blocks = query_grid(p, Config::kBlockM).num_blocks();
    const int64_t key_blocks = key_grid(p, Config::kBlockN).num_blocks();
    const auto main = bwd_sm80<Config, Variant>;
    const char* error = launch(bwd_preprocess<Config>, query_blocks, Config::kPreprocessThreads,
                               sizeof(typename Config::PreprocessSmem), device, kernel_params);
    if (!error) error = launch(main, key_blocks, Config::kThreads, Config::kSmemBytes, device, kernel_params);
    if (!error)
        error = launch(bwd_postprocess<Config>, query_blocks, Config::kPostprocessThreads, 0, device, kernel_params);
    return error;
}

template <>
const char* bwd_instance<80, FA_ELEMENT, FA_HEAD_DIM>(const BwdParams& params, void* workspace, const Device& device) {
    using Element = FA_ELEMENT;
    constexpr int kHeadDim = FA_HEAD_DIM;
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        return with_smem(device, [&](auto large_smem) {
            constexpr BwdShapeSm80 kShape = bwd_shape_sm80(kHeadDim, large_smem.value, Variant::kModified);
            return launch_bwd<BwdConfigSm80<Element, kShape>, Variant>(params, workspace, device);
        });
    });
}

}  // namespace flash_attn::cuda
