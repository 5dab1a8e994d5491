// The ops' schemas, and what torch.compile and fake tensors run in place of them.
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include "ops/problem.h"

namespace flash_attn {
namespace {

FwdResult fwd_meta(const FwdArgs& args) {
    validate(args);
    const ProblemArgs& p = args.problem;
    return {at::empty_symint(out_sizes(p), p.q.options()),
            at::empty_symint(lse_sizes(p), p.q.options().dtype(lse_type(p)))};
}

Tensor bwd_meta(const BwdArgs& args) {
    validate(args);
    const ProblemArgs& p = args.problem;
    return at::empty_symint(lse_sizes(p), p.q.options().dtype(lse_type(p)));
}

Tensor attn_probs_meta(const ProbsArgs& args) {
    validate(args);
    const ProblemArgs& p = args.problem;
    return at::empty_symint(probs_sizes(p), p.q.options());
}

}  // namespace

TORCH_LIBRARY(flash_attn, m) {
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, "
        "float? softmax_scale, bool causal, int window_size_left, int window_size_right, float softcap, "
        "float dropout_p, Tensor? rng_state) -> (Tensor out, Tensor softmax_lse)",
        tags);
    m.def(
        "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? alibi_slopes, float? softmax_scale, "
        "bool causal, int window_size_left, int window_size_right, float softcap, float dropout_p, Tensor? rng_state, "
        "bool deterministic) -> Tensor dsoftmax_sum",
        tags);
    m.def(
        "attn_probs(Tensor q, Tensor k, Tensor softmax_lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, "
        "Tensor? alibi_slopes, float? softmax_scale, bool causal, int window_size_left, int window_size_right, "
        "float softcap, float dropout_p, Tensor? rng_state) -> Tensor",
        tags);
}

TORCH_LIBRARY_IMPL(flash_attn, Meta, m) {
    m.impl("fwd", fwd_op<fwd_meta>);
    m.impl("bwd", bwd_op<bwd_meta>);
    m.impl("attn_probs", attn_probs_op<attn_probs_meta>);
}

}  // namespace flash_attn
