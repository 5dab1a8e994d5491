// The backend for compute capability 8.0 and later: runs every problem.
#include "cuda/backend.h"
#include "cuda/instances.h"
#include "cuda/sm80/config.h"
#include "cuda/sm80/with_smem.h"
#include "policy/score.h"

namespace flash_attn::cuda {
namespace {

constexpr int kOldest = 80;  // cp.async, bf16 and m16n8k16
static_assert(kHeadDimsSm80[std::size(kHeadDimsSm80) - 1] == kMaxHeadDim);

template <class Params> std::string why_not(const Params& params, const Device& device) {
    if (device.compute_capability < kOldest)
        return "compute capability " + version_of(device.compute_capability) + " is older than " + version_of(kOldest);
    return why_no_instance(params.problem, kHeadDimsSm80);
}

int64_t workspace_of_bwd(const BwdParams& params, const Device& device) {
    const Problem& p = params.problem;
    const int head_dim = instance_head_dim(p, kHeadDimsSm80);
    const BwdShapeSm80 shape = bwd_shape_sm80(head_dim, has_large_smem(device), modifies_scores(p));
    return WorkspaceOffsets(p, workspace_shape(shape)).end;
}

}  // namespace

template <> const Backend& backend<80>() {
    constexpr const char* kCode = FLASH_ATTN_BACKEND_CODE;
    using Kernels = Instances<80, kHeadDimsSm80, *kCode != '\0'>;
    static constexpr Backend kBackend{
        .name = "sm80",
        .code = kCode,
        .fwd = {why_not<FwdParams>, no_workspace<FwdParams>, Kernels::fwd},
        .bwd = {why_not<BwdParams>, workspace_of_bwd, Kernels::bwd},
        .attn_probs = {why_not<ProbsParams>, no_workspace<ProbsParams>, Kernels::attn_probs},
        .make_range_blocks = Kernels::make_range_blocks,
    };
    return kBackend;
}

}  // namespace flash_attn::cuda
