// The entry points of kernels.h: choose the instance for the element type and head_dim of a problem.
#include "host_device.h"
#include "launch/instances.h"
#include "launch/workspace.h"

namespace flash_attn::cuda {
namespace {

template <int... kValues> struct Values {};
using HeadDims = Values<64, 96, 128, 192, 256>;
static_assert(kMaxHeadDim == 256);

template <int kHeadDim> struct HeadDim { static constexpr int value = kHeadDim; };
template <class T> struct Type { using type = T; };

// f(HeadDim<d>) for the first d that is large enough.
template <class F, int... kValues> const char* with_head_dim(int head_dim, Values<kValues...>, F f) {
    const char* result = "head_dim is too large for the CUDA kernels";
    static_cast<void>(((head_dim <= kValues && (result = f(HeadDim<kValues>()), true)) || ...));
    return result;
}

// f(Type<Element>, HeadDim<d>).
template <class F> const char* with_instance(const Problem& p, F f) {
    return with_head_dim(max(p.head_dim, p.head_dim_v), HeadDims(), [&](auto head_dim) -> const char* {
        if (p.type == ElementType::kBFloat16) return f(Type<bf16>(), head_dim);
        if (p.type == ElementType::kFloat16) return f(Type<fp16>(), head_dim);
        return "the CUDA kernels take bfloat16 and float16 only";
    });
}

}  // namespace

const char* run_fwd(const FwdParams& params, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        return run_fwd_sm80<typename decltype(type)::type, head_dim.value>(params, device);
    });
}

const char* run_bwd(const BwdParams& params, void* workspace, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        return run_bwd_sm80<typename decltype(type)::type, head_dim.value>(params, workspace, device);
    });
}

const char* run_attn_probs(const ProbsParams& params, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        return run_attn_probs_sm80<typename decltype(type)::type, head_dim.value>(params, device);
    });
}

int64_t bwd_workspace_bytes(const BwdParams& params) {
    const Problem& p = params.problem;
    int64_t sums = 0;
    with_head_dim(max(p.head_dim, p.head_dim_v), HeadDims(), [&](auto head_dim) -> const char* {
        sums = max(dq_sums_bytes(p, kLargestBlockM, head_dim.value), dq_sums_bytes(p, kSmallestBlockM, head_dim.value));
        return nullptr;
    });
    return sums + p.num_heads * num_dq_tiles(p, kSmallestBlockM) * int64_t(sizeof(int32_t));
}

}  // namespace flash_attn::cuda
