// The ops of flash_attn 2.8.3 under their own names and schemas, implemented by ours. Other programs refer to them by
// name: activation checkpointing policies, FLOP counters, sequence-parallel training.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>
#include <algorithm>
#include <limits>
#include "ops/arguments.h"

namespace flash_attn {

using OriginalFwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, softmax_lse, S_dmask, rng_state

// Their arguments, unpacked into our records.
struct OriginalFwdArgs {
    ProblemArgs problem;
    bool return_softmax;
};
struct OriginalBwdArgs {
    ProblemArgs problem;
    const Tensor& dout;
    const Tensor& out;
    const Tensor& softmax_lse;
    const OptionalTensor& dq;
    const OptionalTensor& dk;
    const OptionalTensor& dv;
    bool deterministic;
};

inline int64_t as_int(const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); }

inline OriginalFwdArgs dense_fwd_args(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                                      double softmax_scale, bool causal, c10::SymInt window_size_left,
                                      c10::SymInt window_size_right, double softcap, const OptionalTensor& alibi_slopes,
                                      bool return_softmax) {
    return {{{.alibi_slopes = alibi_slopes,
              .softmax_scale = softmax_scale,
              .causal = causal,
              .window_size_left = as_int(window_size_left),
              .window_size_right = as_int(window_size_right),
              .softcap = softcap,
              .dropout_p = dropout_p},
             Pass::kForward,
             q,
             k,
             &v},
            return_softmax};
}

inline OriginalFwdArgs varlen_fwd_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                                       double dropout_p, double softmax_scale, bool causal,
                                       c10::SymInt window_size_left, c10::SymInt window_size_right, double softcap,
                                       const OptionalTensor& alibi_slopes, bool return_softmax,
                                       const OptionalTensor& block_table, const OptionalTensor& leftpad_k,
                                       const OptionalTensor& seqused_k,
                                       bool /*zero_tensors: nothing is ever left unwritten*/) {
    OriginalFwdArgs args = dense_fwd_args(q, k, v, dropout_p, softmax_scale, causal, window_size_left,
                                          window_size_right, softcap, alibi_slopes, return_softmax);
    args.problem.cu_seqlens_q = cu_seqlens_q;
    args.problem.cu_seqlens_k = cu_seqlens_k;
    args.problem.max_seqlen_q = std::move(max_seqlen_q);
    args.problem.max_seqlen_k = std::move(max_seqlen_k);
    args.problem.seqused_k = seqused_k;
    args.problem.leftpad_k = leftpad_k;
    args.problem.block_table = block_table;
    return args;
}

inline OriginalBwdArgs dense_bwd_args(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out, const Tensor& softmax_lse, const OptionalTensor& dq,
                                      const OptionalTensor& dk, const OptionalTensor& dv, double dropout_p,
                                      double softmax_scale, bool causal, c10::SymInt window_size_left,
                                      c10::SymInt window_size_right, double softcap, const OptionalTensor& alibi_slopes,
                                      bool deterministic, const OptionalTensor& rng_state) {
    return {{{.alibi_slopes = alibi_slopes,
              .softmax_scale = softmax_scale,
              .causal = causal,
              .window_size_left = as_int(window_size_left),
              .window_size_right = as_int(window_size_right),
              .softcap = softcap,
              .dropout_p = dropout_p,
              .rng_state = rng_state},
             Pass::kBackward,
             q,
             k,
             &v},
            dout,
            out,
            softmax_lse,
            dq,
            dk,
            dv,
            deterministic};
}

inline OriginalBwdArgs varlen_bwd_args(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& out, const Tensor& softmax_lse, const OptionalTensor& dq,
                                       const OptionalTensor& dk, const OptionalTensor& dv, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                                       double dropout_p, double softmax_scale, bool causal,
                                       c10::SymInt window_size_left, c10::SymInt window_size_right, double softcap,
                                       const OptionalTensor& alibi_slopes, bool deterministic,
                                       const OptionalTensor& rng_state, bool /*zero_tensors*/) {
    OriginalBwdArgs args =
        dense_bwd_args(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                       window_size_right, softcap, alibi_slopes, deterministic, rng_state);
    args.problem.cu_seqlens_q = cu_seqlens_q;
    args.problem.cu_seqlens_k = cu_seqlens_k;
    args.problem.max_seqlen_q = std::move(max_seqlen_q);
    args.problem.max_seqlen_k = std::move(max_seqlen_k);
    return args;
}

// Seed and offset of a dropout mask, from torch's generator, so that restoring its state repeats the mask.
inline Tensor draw_rng_state(const Tensor& q) {
    return at::randint(std::numeric_limits<int64_t>::max(), {2}, q.options().dtype(at::kLong));
}

// The rng_state returned without dropout: zeros.
inline Tensor no_rng_state(const Tensor& q) {
    Tensor state = at::empty({2}, q.options().dtype(at::kLong));
    if (!state.is_cpu()) return state.zero_();
    std::fill_n(state.mutable_data_ptr<int64_t>(), 2, 0);  // an op call would cost more than everything else here
    return state;
}

template <FwdImplementation fwd, ProbsImplementation attn_probs>
OriginalFwdResult run_original_fwd(OriginalFwdArgs args) {
    ProblemArgs& problem = args.problem;
    const bool drops = problem.dropout_p > 0;
    Tensor rng_state = drops ? draw_rng_state(problem.q) : no_rng_state(problem.q);
    if (drops) problem.rng_state = rng_state;
    auto [out, softmax_lse, max_logits] = fwd({problem});
    Tensor s_dmask;
    if (drops && args.return_softmax) {
        problem.pass = Pass::kProbs;
        problem.v = nullptr;
        s_dmask = attn_probs({problem, softmax_lse});
    } else {
        s_dmask = at::empty({0}, problem.q.options());
    }
    return {std::move(out), std::move(softmax_lse), std::move(s_dmask), std::move(rng_state)};
}

template <BwdImplementation bwd> Tensor run_original_bwd(const OriginalBwdArgs& args) {
    // A gradient without an output argument is computed as well, into new memory.
    const auto target = [](const OptionalTensor& gradient, const Tensor& of) {
        return gradient ? *gradient : gradient_buffer(of);
    };
    const ProblemArgs& problem = args.problem;
    const Tensor dq = target(args.dq, problem.q), dk = target(args.dk, problem.k), dv = target(args.dv, *problem.v);
    return bwd({problem, args.dout, std::nullopt, args.out, args.softmax_lse, dq, dk, dv, args.deterministic});
}

// An op: unpacks its arguments, then runs.
template <auto unpack, auto run, class Unpack = decltype(unpack)> struct Unpacked;
template <auto unpack, auto run, class Record, class... Args> struct Unpacked<unpack, run, Record (*)(Args...)> {
    static auto call(Args... args) { return run(unpack(std::forward<Args>(args)...)); }
};

// Registers all ops under every name, for one dispatch key.
template <FwdImplementation fwd, BwdImplementation bwd, ProbsImplementation attn_probs>
void implement_ops(torch::Library& m) {
    m.impl("fwd", Ops::run_fwd<fwd>);
    m.impl("fwd.out", Ops::run_fwd_out<fwd>);
    m.impl("bwd", Ops::run_bwd<bwd>);
    m.impl("bwd.out", Ops::run_bwd_out<bwd>);
    m.impl("attn_probs", Ops::run_attn_probs<attn_probs>);
    m.impl("_flash_attn_forward", Unpacked<dense_fwd_args, run_original_fwd<fwd, attn_probs>>::call);
    m.impl("_flash_attn_varlen_forward", Unpacked<varlen_fwd_args, run_original_fwd<fwd, attn_probs>>::call);
    m.impl("_flash_attn_backward", Unpacked<dense_bwd_args, run_original_bwd<bwd>>::call);
    m.impl("_flash_attn_varlen_backward", Unpacked<varlen_bwd_args, run_original_bwd<bwd>>::call);
}

}  // namespace flash_attn
