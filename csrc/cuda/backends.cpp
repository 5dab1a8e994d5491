// The entry points of cuda/api.h: choose the instance for the element type and head_dim of a problem.
// FLASH_ATTN_HOPPER: the kernels for compute capability 9.0 are there too.
#include <type_traits>
#include "cuda/instances.h"
#include "cuda/sm90/can_implement.h"
#include "policy/host_device.h"
#include "policy/score.h"

namespace flash_attn::cuda {
namespace {

template <int... kValues> struct Values {};
using HeadDims = Values<64, 96, 128, 192, 256>;
static_assert(kMaxHeadDim == 256);

template <int kHeadDim> using HeadDim = std::integral_constant<int, kHeadDim>;

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

const char* run_fwd(const FwdParams& params, [[maybe_unused]] void* workspace, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        using Element = typename decltype(type)::type;
#ifdef FLASH_ATTN_HOPPER
        if (can_implement(params, device)) return run_fwd_sm90<Element, head_dim.value>(params, workspace, device);
#endif
        return run_fwd_sm80<Element, head_dim.value>(params, device);
    });
}

const char* run_bwd(const BwdParams& params, void* workspace, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        using Element = typename decltype(type)::type;
#ifdef FLASH_ATTN_HOPPER
        if (can_implement(params, device)) return run_bwd_sm90<Element, head_dim.value>(params, workspace, device);
#endif
        return run_bwd_sm80<Element, head_dim.value>(params, workspace, device);
    });
}

const char* run_attn_probs(const ProbsParams& params, const Device& device) {
    return with_instance(params.problem, [&](auto type, auto head_dim) {
        return run_attn_probs_sm80<typename decltype(type)::type, head_dim.value>(params, device);
    });
}

int64_t fwd_workspace_bytes([[maybe_unused]] const FwdParams& params, [[maybe_unused]] const Device& device) {
#ifdef FLASH_ATTN_HOPPER
    if (can_implement(params, device)) return kFwdCounterBytes + kFwdRepeatBytes * fwd_repeat_places(params.problem);
#endif
    return 0;
}

int64_t bwd_workspace_bytes(const BwdParams& params, [[maybe_unused]] const Device& device) {
    const Problem& p = params.problem;
    int64_t bytes = 0;
    with_head_dim(max(p.head_dim, p.head_dim_v), HeadDims(), [&](auto head_dim) -> const char* {
        // The generic kernels have tiles of 32 or 64 queries.
        for (int block_m = 32; block_m <= 64; block_m *= 2)
            bytes = max(bytes, WorkspaceOffsets(p, {block_m, block_m * head_dim.value, 1, false}).end);
#ifdef FLASH_ATTN_HOPPER
        if (can_implement(params, device))
            bytes = WorkspaceOffsets(p, hopper_workspace(head_dim.value, modifies_scores(p))).end;
#endif
        return nullptr;
    });
    return bytes;
}

}  // namespace flash_attn::cuda
