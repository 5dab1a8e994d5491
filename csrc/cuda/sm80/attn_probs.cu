// The matrix of weights, for one FA_ELEMENT and FA_HEAD_DIM.
#include "cuda/instances.h"
#include "cuda/launch.h"
#include "cuda/sm80/attn_probs.h"
#include "cuda/sm80/config.h"

namespace flash_attn::cuda {

template <class Element, int kHeadDim>
const char* run_attn_probs_sm80(const ProbsParams& params, const Device& device) {
    using Config = typename FwdTilesSm80<Element, kHeadDim>::Small;
    const int64_t blocks = query_grid(params.problem, Config::kBlockM).num_blocks();
    return launch(attn_probs_sm80<Config>, blocks, Config::kThreads, Config::kSmemBytes, device, params);
}

template const char* run_attn_probs_sm80<FA_ELEMENT, FA_HEAD_DIM>(const ProbsParams&, const Device&);

}  // namespace flash_attn::cuda
