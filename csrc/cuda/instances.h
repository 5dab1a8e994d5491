// What the .cu files of this folder define, each compiled once for every element type and head_dim. Smaller head_dims
// run in the next one, with columns of zeros.
#pragma once
#include <cstdint>
#include "cuda/api.h"

namespace flash_attn {

struct bf16;
struct fp16;

namespace cuda {

template <class T> struct Type { using type = T; };

template <class Element, int kHeadDim> const char* run_fwd_sm80(const FwdParams& params, const Device& device);
template <class Element, int kHeadDim>
const char* run_fwd_sm90(const FwdParams& params, void* workspace, const Device& device);
template <class Element, int kHeadDim>
const char* run_bwd_sm80(const BwdParams& params, void* workspace, const Device& device);
template <class Element, int kHeadDim>
const char* run_bwd_sm90(const BwdParams& params, void* workspace, const Device& device);
template <class Element, int kHeadDim> const char* run_attn_probs_sm80(const ProbsParams& params, const Device& device);

}  // namespace cuda
}  // namespace flash_attn
