// The ops of flash_attn 2.8.3 by their own names and schemas, over the implementations of ours. Programs name them:
// policies of activation checkpointing, FLOP counters, sequence parallel training.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>
#include <algorithm>
#include <limits>
#include "ops/arguments.h"

namespace flash_attn {

using OriginalFwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, softmax_lse, S_dmask, rng_state

// Seed and offset of a dropout mask, from torch's generator: rewinding that repeats the mask.
inline Tensor draw_rng_state(const Tensor& q) {
    return at::randint(std::numeric_limits<int64_t>::max(), {2}, q.options().dtype(at::kLong));
}

// What stands for it where nothing is dropped: zeros.
inline Tensor no_rng_state(const Tensor& q) {
    Tensor state = at::empty({2}, q.options().dtype(at::kLong));
    if (!state.is_cpu()) return state.zero_();
    std::fill_n(state.mutable_data_ptr<int64_t>(), 2, 0);  // a call of an op would cost more than all the rest here
    return state;
}

template <FwdResult (*fwd)(const FwdArgs&), Tensor (*attn_probs)(const ProbsArgs&)>
OriginalFwdResult run_original_fwd(const ProblemArgs& problem, bool return_softmax) {
    auto [out, softmax_lse] = fwd({problem});
    const Tensor& q = problem.q;
    const bool drops = problem.dropout_p > 0;
    Tensor s_dmask;
    if (drops && return_softmax) {
        ProblemArgs of_probs = problem;
        of_probs.pass = Pass::kProbs;
        of_probs.v = nullptr;
        s_dmask = attn_probs({of_probs, softmax_lse});
    } else {
        s_dmask = at::empty({0}, q.options());
    }
    Tensor rng_state = drops ? *problem.rng_state : no_rng_state(q);
    return {std::move(out), std::move(softmax_lse), std::move(s_dmask), std::move(rng_state)};
}

template <FwdResult (*fwd)(const FwdArgs&), Tensor (*attn_probs)(const ProbsArgs&)>
OriginalFwdResult original_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                                  double softmax_scale, bool causal, c10::SymInt window_size_left,
                                  c10::SymInt window_size_right, double softcap, const OptionalTensor& alibi_slopes,
                                  bool return_softmax) {
    const OptionalTensor none, rng_state = dropout_p > 0 ? OptionalTensor(draw_rng_state(q)) : std::nullopt;
    return run_original_fwd<fwd, attn_probs>(
        {Pass::kForward, q, k, &v, none, none, 0, 0, none, none, none, alibi_slopes, softmax_scale, causal,
         window_size_left.guard_int(__FILE__, __LINE__), window_size_right.guard_int(__FILE__, __LINE__), softcap,
         dropout_p, rng_state},
        return_softmax);
}

template <FwdResult (*fwd)(const FwdArgs&), Tensor (*attn_probs)(const ProbsArgs&)>
OriginalFwdResult original_varlen_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                         const Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                                         double dropout_p, double softmax_scale, bool causal,
                                         c10::SymInt window_size_left, c10::SymInt window_size_right, double softcap,
                                         const OptionalTensor& alibi_slopes, bool return_softmax,
                                         const OptionalTensor& block_table, const OptionalTensor& leftpad_k,
                                         const OptionalTensor& seqused_k,
                                         bool /*zero_tensors: nothing is ever left unwritten*/) {
    const OptionalTensor cu_q = cu_seqlens_q, cu_k = cu_seqlens_k,
                         rng_state = dropout_p > 0 ? OptionalTensor(draw_rng_state(q)) : std::nullopt;
    return run_original_fwd<fwd, attn_probs>(
        {Pass::kForward, q, k, &v, cu_q, cu_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k, leftpad_k,
         block_table, alibi_slopes, softmax_scale, causal, window_size_left.guard_int(__FILE__, __LINE__),
         window_size_right.guard_int(__FILE__, __LINE__), softcap, dropout_p, rng_state},
        return_softmax);
}

// A gradient that nobody asked for is computed all the same, into memory of its own.
inline Tensor gradient_buffer(const OptionalTensor& gradient, const Tensor& of) {
    return gradient ? *gradient : at::empty_symint(of.sym_sizes(), of.options());
}

template <Tensor (*bwd)(const BwdArgs&)> Tensor run_original_bwd(const ProblemArgs& problem, const Tensor& dout,
                                                                 const Tensor& out, const Tensor& softmax_lse,
                                                                 const OptionalTensor& dq, const OptionalTensor& dk,
                                                                 const OptionalTensor& dv, bool deterministic) {
    const OptionalTensor no_dlse;
    const Tensor own_dq = gradient_buffer(dq, problem.q), own_dk = gradient_buffer(dk, problem.k),
                 own_dv = gradient_buffer(dv, *problem.v);
    return bwd({problem, dout, no_dlse, out, softmax_lse, own_dq, own_dk, own_dv, deterministic});
}

template <Tensor (*bwd)(const BwdArgs&)>
Tensor original_bwd_op(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& softmax_lse, const OptionalTensor& dq, const OptionalTensor& dk,
                       const OptionalTensor& dv, double dropout_p, double softmax_scale, bool causal,
                       c10::SymInt window_size_left, c10::SymInt window_size_right, double softcap,
                       const OptionalTensor& alibi_slopes, bool deterministic, const OptionalTensor& rng_state) {
    const OptionalTensor none;
    return run_original_bwd<bwd>({Pass::kBackward, q, k, &v, none, none, 0, 0, none, none, none, alibi_slopes,
                                  softmax_scale, causal, window_size_left.guard_int(__FILE__, __LINE__),
                                  window_size_right.guard_int(__FILE__, __LINE__), softcap, dropout_p, rng_state},
                                 dout, out, softmax_lse, dq, dk, dv, deterministic);
}

template <Tensor (*bwd)(const BwdArgs&)>
Tensor original_varlen_bwd_op(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                              const Tensor& softmax_lse, const OptionalTensor& dq, const OptionalTensor& dk,
                              const OptionalTensor& dv, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, double dropout_p,
                              double softmax_scale, bool causal, c10::SymInt window_size_left,
                              c10::SymInt window_size_right, double softcap, const OptionalTensor& alibi_slopes,
                              bool deterministic, const OptionalTensor& rng_state, bool /*zero_tensors*/) {
    const OptionalTensor none, cu_q = cu_seqlens_q, cu_k = cu_seqlens_k;
    return run_original_bwd<bwd>(
        {Pass::kBackward, q, k, &v, cu_q, cu_k, std::move(max_seqlen_q), std::move(max_seqlen_k), none, none, none,
         alibi_slopes, softmax_scale, causal, window_size_left.guard_int(__FILE__, __LINE__),
         window_size_right.guard_int(__FILE__, __LINE__), softcap, dropout_p, rng_state},
        dout, out, softmax_lse, dq, dk, dv, deterministic);
}

// Under every name, for one dispatch key.
template <FwdResult (*fwd)(const FwdArgs&), Tensor (*bwd)(const BwdArgs&), Tensor (*attn_probs)(const ProbsArgs&)>
void implement_ops(torch::Library& m) {
    m.impl("fwd", fwd_op<fwd>);
    m.impl("bwd", bwd_op<bwd>);
    m.impl("attn_probs", attn_probs_op<attn_probs>);
    m.impl("_flash_attn_forward", original_fwd_op<fwd, attn_probs>);
    m.impl("_flash_attn_varlen_forward", original_varlen_fwd_op<fwd, attn_probs>);
    m.impl("_flash_attn_backward", original_bwd_op<bwd>);
    m.impl("_flash_attn_varlen_backward", original_varlen_bwd_op<bwd>);
}

}  // namespace flash_attn
