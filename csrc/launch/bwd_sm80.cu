// The backward pass, for one FA_ELEMENT and FA_HEAD_DIM: three kernels, one after another.
#include "kernels/bwd_finish.h"
#include "kernels/bwd_preprocess.h"
#include "kernels/bwd_sm80.h"
#include "launch/dispatch.h"
#include "launch/instances.h"
#include "launch/launch.h"
#include "launch/workspace.h"

namespace flash_attn::cuda {

static DqAccum dq_accum_in(void* workspace, const Problem& p, int block_m, int head_dim) {
    char* const bytes = static_cast<char*>(workspace);
    return {reinterpret_cast<float*>(bytes), reinterpret_cast<int32_t*>(bytes + dq_sums_bytes(p, block_m, head_dim)),
            num_dq_tiles(p, block_m)};
}

template <class Element, int kHeadDim>
const char* run_bwd_sm80(const BwdParams& params, void* workspace, const Device& device) {
    const Problem& p = params.problem;
    return with_policies<BwdTilesSm80<Element, kHeadDim>>(p, device, [&](auto config, auto mask, auto scores) {
        using Config = typename decltype(config)::type;
        const auto main = bwd_sm80<Config, typename decltype(mask)::type, typename decltype(scores)::type>;
        const BwdKernelParams kernel_params{params, dq_accum_in(workspace, p, Config::kBlockM, kHeadDim)};
        const int64_t query_blocks = query_grid(p, Config::kBlockM).num_blocks();
        const int64_t key_blocks = key_grid(p, Config::kBlockN).num_blocks();
        const char* error = launch(bwd_preprocess<Config>, query_blocks, Config::kPreprocessThreads,
                                   Config::kPreprocessSmemBytes, device, kernel_params);
        if (!error) error = launch(main, key_blocks, Config::kThreads, Config::kSmemBytes, device, kernel_params);
        if (!error) error = launch(bwd_finish<Config>, query_blocks, Config::kThreads, 0, device, kernel_params);
        return error;
    });
}

template const char* run_bwd_sm80<FA_ELEMENT, FA_HEAD_DIM>(const BwdParams&, void*, const Device&);

}  // namespace flash_attn::cuda
