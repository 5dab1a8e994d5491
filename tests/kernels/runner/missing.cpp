// Stubs for the instances of the kernels for FA_ARCH that a build leaves out. The linker prefers those that it has:
// these symbols are weak.
#include "cuda/instances.h"

namespace flash_attn::cuda {
namespace {

constexpr const char* kMissing = "this build has no kernels for this element type and head_dim";
constexpr int kHeadDims[] = {
#include FA_HEAD_DIMS
};

}  // namespace

template <int kArch, class Element, int kHeadDim> const char* fwd_instance(const FwdParams&, void*, const Device&) {
    return kMissing;
}
template <int kArch, class Element, int kHeadDim> const char* bwd_instance(const BwdParams&, void*, const Device&) {
    return kMissing;
}
template <int kArch, class Element, int kHeadDim>
const char* attn_probs_instance(const ProbsParams&, void*, const Device&) {
    return kMissing;
}

// Taking their addresses instantiates them.
template <class Element, size_t... i> const void* missing(size_t n, std::index_sequence<i...>) {
    const void* const all[] = {
        reinterpret_cast<const void*>(fwd_instance<FA_ARCH, Element, kHeadDims[i]>)...,
        reinterpret_cast<const void*>(bwd_instance<FA_ARCH, Element, kHeadDims[i]>)...,
        reinterpret_cast<const void*>(attn_probs_instance<FA_ARCH, Element, kHeadDims[i]>)...,
    };
    return all[n];
}
template <int kArch> const void* missing(size_t n);
template <> const void* missing<FA_ARCH>(size_t n) {
    constexpr auto kAll = std::make_index_sequence<std::size(kHeadDims)>();
    return n % 2 ? missing<bf16>(n / 2, kAll) : missing<fp16>(n / 2, kAll);
}

}  // namespace flash_attn::cuda
