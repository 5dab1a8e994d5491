// The attention matrix, for one FA_ELEMENT and FA_HEAD_DIM.
#include "cuda/instance.h"
#include "cuda/launch.h"
#include "cuda/sm80/attn_probs.h"

namespace flash_attn::cuda {

template <>
const char* attn_probs_instance<80, FA_ELEMENT, FA_HEAD_DIM>(const ProbsParams& params, void*, const Device& device) {
    using Element = FA_ELEMENT;
    constexpr int kHeadDim = FA_HEAD_DIM;
    using Config = FwdConfigSm80<Element, fwd_shape_sm80(kHeadDim, false)>;
    const int64_t blocks = query_grid(params.problem, Config::kBlockM).num_blocks();
    return launch(attn_probs_sm80<Config>, blocks, Config::kThreads, Config::kSmemBytes, device, params);
}

}  // namespace flash_attn::cuda
