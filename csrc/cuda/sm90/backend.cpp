// The backend for compute capability 9.0: runs problems whose tensors TMA can access.
#include "cuda/backend.h"
#include <initializer_list>
#include "cuda/instances.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/launch_plan.h"
#include "policy/score.h"

namespace flash_attn::cuda {
namespace {

struct TmaOperand {
    const char* what;  // "read q"
    const TensorView& view;
    TensorSize size;
};
std::string why_not_by_tma(std::initializer_list<TmaOperand> operands) {
    for (const TmaOperand& each : operands) {
        const TmaStrides strides(each.view, each.size);
        if (!strides.fit()) return std::string("TMA cannot ") + each.what + ": " + strides.why_not();
    }
    return "";
}

std::string why_not(const Problem& p, const Device& device) {
    if (device.compute_capability != 90)
        return "compute capability " + version_of(device.compute_capability) + " is not 9.0";
    if (p.paged_kv.block_table) return "keys and values are in pages (block_table)";
    if (std::string reason = why_no_instance(p, kHeadDimsSm90); !reason.empty()) return reason;
    return why_not_by_tma({{"read q", p.q, query_size(p, p.head_dim)},
                           {"read k", p.k, key_size(p, p.head_dim)},
                           {"read v", p.v, key_size(p, p.head_dim_v)}});
}
std::string why_not_fwd(const FwdParams& params, const Device& device) {
    const Problem& p = params.problem;
    if (std::string reason = why_not(p, device); !reason.empty() || p.float_results) return reason;
    return why_not_by_tma({{"write out", params.out, query_size(p, p.head_dim_v)}});
}
std::string why_not_bwd(const BwdParams& params, const Device& device) {
    const Problem& p = params.problem;
    if (std::string reason = why_not(p, device); !reason.empty()) return reason;
    std::string reason = why_not_by_tma({{"read dout", params.dout, query_size(p, p.head_dim_v)}});
    if (!reason.empty() || p.float_results) return reason;
    return why_not_by_tma(
        {{"write dk", params.dk, key_size(p, p.head_dim)}, {"write dv", params.dv, key_size(p, p.head_dim_v)}});
}

int64_t workspace_of_fwd(const FwdParams& params, const Device&) {
    return kFwdCounterBytes + kFwdRepeatBytes * fwd_repeat_places(params.problem);
}
int64_t workspace_of_bwd(const BwdParams& params, const Device&) {
    const Problem& p = params.problem;
    const BwdShapeSm90 shape = bwd_shape_sm90(instance_head_dim(p, kHeadDimsSm90), modifies_scores(p));
    return WorkspaceOffsets(p, workspace_shape(shape)).end;
}

}  // namespace

template <> const Backend& backend<90>() {
    constexpr const char* kCode = FLASH_ATTN_BACKEND_CODE;
    using Kernels = Instances<90, kHeadDimsSm90, *kCode != '\0'>;
    static constexpr Backend kBackend{
        .name = "sm90",
        .code = kCode,
        .fwd = {why_not_fwd, workspace_of_fwd, Kernels::fwd},
        .bwd = {why_not_bwd, workspace_of_bwd, Kernels::bwd},
        .attn_probs = {},
        .make_range_blocks = Kernels::make_range_blocks,
    };
    return kBackend;
}

}  // namespace flash_attn::cuda
