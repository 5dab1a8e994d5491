// What the ops are given, bundled, so that the long argument lists are written once for every dispatch key.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <optional>
#include <tuple>
#include <utility>

namespace flash_attn {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

enum class Pass { kForward, kBackward, kProbs };

// The part that all ops share. Dense: q [batch_size, seqlen_q, num_heads, head_dim], k [batch_size, seqlen_k,
// num_heads_k, head_dim], v [batch_size, seqlen_k, num_heads_k, head_dim_v]. Packed, when cu_seqlens are given:
// q [total_q, num_heads, head_dim], and so on. Paged: k [num_pages, page_size, num_heads_k, head_dim].
struct ProblemArgs {
    Pass pass;
    const Tensor& q;
    const Tensor& k;
    const Tensor* v;  // null in attn_probs
    const OptionalTensor& cu_seqlens_q;
    const OptionalTensor& cu_seqlens_k;
    c10::SymInt max_seqlen_q, max_seqlen_k;  // dense: unused
    const OptionalTensor& seqused_k;
    const OptionalTensor& leftpad_k;
    const OptionalTensor& block_table;
    const OptionalTensor& alibi_slopes;
    std::optional<double> softmax_scale;
    bool causal;
    int64_t window_size_left, window_size_right;
    double softcap, dropout_p;
    const OptionalTensor& rng_state;

    bool packed() const { return cu_seqlens_q.has_value() || cu_seqlens_k.has_value(); }
};

struct FwdArgs { ProblemArgs problem; };

struct BwdArgs {
    ProblemArgs problem;
    const Tensor& dout;
    const OptionalTensor& dlse;
    const Tensor& out;
    const Tensor& softmax_lse;
    const Tensor& dq;
    const Tensor& dk;
    const Tensor& dv;
    bool deterministic;
};

struct ProbsArgs {
    ProblemArgs problem;
    const Tensor& softmax_lse;
};

using FwdResult = std::tuple<Tensor, Tensor>;  // out, softmax_lse

// The ops themselves, as the dispatcher calls them, around one implementation.
template <FwdResult (*implementation)(const FwdArgs&)>
FwdResult fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
                 const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                 const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k, const OptionalTensor& block_table,
                 const OptionalTensor& alibi_slopes, std::optional<double> softmax_scale, bool causal,
                 int64_t window_size_left, int64_t window_size_right, double softcap, double dropout_p,
                 const OptionalTensor& rng_state) {
    return implementation({{Pass::kForward, q, k, &v, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q),
                            std::move(max_seqlen_k), seqused_k, leftpad_k, block_table, alibi_slopes, softmax_scale,
                            causal, window_size_left, window_size_right, softcap, dropout_p, rng_state}});
}

template <Tensor (*implementation)(const BwdArgs&)>
Tensor bwd_op(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& softmax_lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
              c10::SymInt max_seqlen_k, const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
              const OptionalTensor& alibi_slopes, std::optional<double> softmax_scale, bool causal,
              int64_t window_size_left, int64_t window_size_right, double softcap, double dropout_p,
              const OptionalTensor& rng_state, bool deterministic) {
    const OptionalTensor no_block_table;
    return implementation({{Pass::kBackward, q, k, &v, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q),
                            std::move(max_seqlen_k), seqused_k, leftpad_k, no_block_table, alibi_slopes, softmax_scale,
                            causal, window_size_left, window_size_right, softcap, dropout_p, rng_state},
                           dout,
                           dlse,
                           out,
                           softmax_lse,
                           dq,
                           dk,
                           dv,
                           deterministic});
}

template <Tensor (*implementation)(const ProbsArgs&)>
Tensor attn_probs_op(const Tensor& q, const Tensor& k, const Tensor& softmax_lse, const OptionalTensor& cu_seqlens_q,
                     const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                     const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
                     const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
                     std::optional<double> softmax_scale, bool causal, int64_t window_size_left,
                     int64_t window_size_right, double softcap, double dropout_p, const OptionalTensor& rng_state) {
    return implementation({{Pass::kProbs, q, k, nullptr, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q),
                            std::move(max_seqlen_k), seqused_k, leftpad_k, block_table, alibi_slopes, softmax_scale,
                            causal, window_size_left, window_size_right, softcap, dropout_p, rng_state},
                           softmax_lse});
}

}  // namespace flash_attn
