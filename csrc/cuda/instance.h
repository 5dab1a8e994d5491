// What a .cu file of an architecture defines, once per element type and head_dim: a kernel instance, as a host function
// that launches it.
#pragma once
#include <type_traits>
#include "cuda/device.h"
#include "problem.h"

namespace flash_attn {

struct bf16;
struct fp16;

namespace cuda {

template <int kHeadDim> using HeadDim = std::integral_constant<int, kHeadDim>;

template <int kArch, class Element, int kHeadDim>
const char* fwd_instance(const FwdParams& params, void* workspace, const Device& device);
template <int kArch, class Element, int kHeadDim>
const char* bwd_instance(const BwdParams& params, void* workspace, const Device& device);
template <int kArch, class Element, int kHeadDim>
const char* attn_probs_instance(const ProbsParams& params, void* workspace, const Device& device);

// Defined in cuda/attention/range_blocks.cu, for all architectures.
const char* make_range_blocks(const Problem& p, QueryBlock* query_blocks, KeyBlock* key_blocks, const Device& device);

}  // namespace cuda
}  // namespace flash_attn
