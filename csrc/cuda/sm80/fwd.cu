// The forward pass, for one FA_ELEMENT and FA_HEAD_DIM.
#include "cuda/instance.h"
#include "cuda/launch.h"
#include "cuda/sm80/fwd.h"
#include "cuda/sm80/with_smem.h"

namespace flash_attn::cuda {

template <>
const char* fwd_instance<80, FA_ELEMENT, FA_HEAD_DIM>(const FwdParams& params, void*, const Device& device) {
    using Element = FA_ELEMENT;
    constexpr int kHeadDim = FA_HEAD_DIM;
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        return with_smem(device, [&](auto large_smem) {
            using Config = FwdConfigSm80<Element, fwd_shape_sm80(kHeadDim, large_smem.value)>;
            const int64_t blocks = query_grid(params.problem, Config::kBlockM).num_blocks();
            return launch(fwd_sm80<Config, Variant>, blocks, Config::kThreads, Config::kSmemBytes, device, params);
        });
    });
}

}  // namespace flash_attn::cuda
