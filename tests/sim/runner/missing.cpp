// Instances of kernels that a build leaves out. The linker prefers what stands before this file, so it must come last.
#include "cuda/instances.h"

namespace flash_attn::cuda {
namespace {

constexpr const char* kMissing = "this build has no kernels for this element type and head_dim";

}  // namespace

template <class Element, int kHeadDim> const char* run_fwd_sm80(const FwdParams&, const Device&) { return kMissing; }
template <class Element, int kHeadDim> const char* run_fwd_sm90(const FwdParams&, void*, const Device&) {
    return kMissing;
}
template <class Element, int kHeadDim> const char* run_bwd_sm80(const BwdParams&, void*, const Device&) {
    return kMissing;
}
template <class Element, int kHeadDim> const char* run_bwd_sm90(const BwdParams&, void*, const Device&) {
    return kMissing;
}
template <class Element, int kHeadDim> const char* run_attn_probs_sm80(const ProbsParams&, const Device&) {
    return kMissing;
}

template <class Element, int... kHeadDims> struct Missing {
    const void* functions[5 * sizeof...(kHeadDims)] = {
        reinterpret_cast<const void*>(run_fwd_sm80<Element, kHeadDims>)...,
        reinterpret_cast<const void*>(run_fwd_sm90<Element, kHeadDims>)...,
        reinterpret_cast<const void*>(run_bwd_sm80<Element, kHeadDims>)...,
        reinterpret_cast<const void*>(run_bwd_sm90<Element, kHeadDims>)...,
        reinterpret_cast<const void*>(run_attn_probs_sm80<Element, kHeadDims>)...,
    };
};
extern const Missing<bf16, 64, 96, 128, 192, 256> missing_bf16;
extern const Missing<fp16, 64, 96, 128, 192, 256> missing_fp16;
const Missing<bf16, 64, 96, 128, 192, 256> missing_bf16;
const Missing<fp16, 64, 96, 128, 192, 256> missing_fp16;

}  // namespace flash_attn::cuda
