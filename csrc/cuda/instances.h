// Kernel instances: the .cu files of an architecture are compiled once per element type and head_dim; this is how its
// backend finds the right one. Other head_dims use the next larger instance, with zero-filled columns.
#pragma once
#include <cstdint>
#include <iterator>
#include <utility>
#include "cuda/backend.h"
#include "cuda/instance.h"
#include "policy/host_device.h"

namespace flash_attn::cuda {

// The smallest head_dim of an ascending list that is large enough; 0 if none is.
template <size_t kCount> constexpr int instance_head_dim(const Problem& p, const int (&head_dims)[kCount]) {
    for (const int head_dim : head_dims)
        if (max(p.head_dim, p.head_dim_v) <= head_dim) return head_dim;
    return 0;
}

// Why there is no instance for a problem; empty if there is one.
template <size_t kCount> std::string why_no_instance(const Problem& p, const int (&head_dims)[kCount]) {
    if (p.type != ElementType::kBFloat16 && p.type != ElementType::kFloat16)
        return "elements are neither bfloat16 nor float16";
    if (instance_head_dim(p, head_dims) == 0)
        return "head_dim is " + std::to_string(max(p.head_dim, p.head_dim_v)) + ", more than " +
               std::to_string(head_dims[kCount - 1]);
    return "";
}

// Calls f(Type<Element>, HeadDim<d>) for the instance of a problem.
template <const auto& kHeadDims, class F> const char* with_instance(const Problem& p, F f) {
    const int needed = instance_head_dim(p, kHeadDims);
    const auto with_head_dim = [&](auto head_dim) {
        return p.type == ElementType::kBFloat16 ? f(Type<bf16>(), head_dim) : f(Type<fp16>(), head_dim);
    };
    return [&]<size_t... i>(std::index_sequence<i...>) {
        const char* result = "there are no kernels for this head_dim";
        static_cast<void>(((kHeadDims[i] == needed && (result = with_head_dim(HeadDim<kHeadDims[i]>()), true)) || ...));
        return result;
    }(std::make_index_sequence<std::size(kHeadDims)>());
}

// The passes of a backend, dispatched to its instances. A build without the backend's kernels instantiates none.
template <int kArch, const auto& kHeadDims, bool kIsBuilt> struct Instances {
    static const char* fwd(const FwdParams& params, void* workspace, const Device& device) {
        return run(params.problem, [&](auto type, auto head_dim) {
            return fwd_instance<kArch, typename decltype(type)::type, head_dim.value>(params, workspace, device);
        });
    }
    static const char* bwd(const BwdParams& params, void* workspace, const Device& device) {
        return run(params.problem, [&](auto type, auto head_dim) {
            return bwd_instance<kArch, typename decltype(type)::type, head_dim.value>(params, workspace, device);
        });
    }
    static const char* attn_probs(const ProbsParams& params, void* workspace, const Device& device) {
        return run(params.problem, [&](auto type, auto head_dim) {
            return attn_probs_instance<kArch, typename decltype(type)::type, head_dim.value>(params, workspace, device);
        });
    }
    static const char* make_range_blocks(const Problem& p, QueryBlock* query_blocks, KeyBlock* key_blocks,
                                         const Device& device) {
        if constexpr (kIsBuilt)
            return cuda::make_range_blocks(p, query_blocks, key_blocks, device);
        else
            return kNotBuilt;
    }

private:
    static constexpr const char* kNotBuilt = "these kernels are not in this build";

    template <class F> static const char* run(const Problem& p, F f) {
        if constexpr (kIsBuilt)
            return with_instance<kHeadDims>(p, f);
        else
            return kNotBuilt;
    }
};

}  // namespace flash_attn::cuda
