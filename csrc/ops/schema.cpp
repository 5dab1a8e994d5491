// The schemas of the ops, and their Meta kernels for torch.compile and fake tensors.
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <string>
#include "ops/kvcache.h"
#include "ops/original_ops.h"
#include "ops/prepare.h"

namespace flash_attn {
namespace {

FwdResult fwd_meta(const FwdArgs& args) {
    validate(args);
    const ProblemArgs& p = args.problem;
    return {args.out ? *args.out : at::empty_symint(out_sizes(p), p.q.options().dtype(result_type(p))),
            at::empty_symint(lse_sizes(p), p.q.options().dtype(lse_type(p))),
            p.return_max_logits ? at::empty_symint(max_logits_sizes(p), p.q.options().dtype(lse_type(p))) : Tensor()};
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

CacheResult fwd_kvcache_meta(const KvCacheArgs& args) {
    validate(args);
    const ProblemArgs p = args.attention();
    return {at::empty_symint(out_sizes(p), p.q.options()),
            at::empty_symint(lse_sizes(p), p.q.options().dtype(lse_type(p)))};
}

// What both tails below say of masks and scores.
const std::string kScores =
    "Tensor? block_table=None, Tensor? alibi_slopes=None, float? softmax_scale=None, bool causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, Tensor? s_aux=None";
// The schema of AttentionArgs.
const std::string kTail =
    "*, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, "
    "Tensor? seqused_k=None, Tensor? leftpad_k=None, " +
    kScores +
    ", float dropout_p=0.0, Tensor? rng_state=None, int? q_start=None, int? k_start=None, Tensor? q_starts=None, "
    "Tensor? k_starts=None, int head_start=0, int? total_heads=None, bool float_results=False, "
    "Tensor? key_ranges=None, bool return_max_logits=False";
// The schema of KvCacheOptions.
const std::string kKvCache =
    "*, Tensor? k=None, Tensor? v=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "bool rotary_interleaved=True, SymInt? cache_seqlen=None, Tensor? cache_seqlens=None, "
    "Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, " +
    kScores + ", int num_splits=0";
const std::string kBackward =
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? dlse=None, ";

// Names, arguments and defaults are those of flash_attn 2.8.3.
void define_original_ops(torch::Library& m) {
    // With dropout, the forward ops draw from torch's generator.
    const std::vector<at::Tag> draws = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
    m.def(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        draws);
    m.def(
        "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
        "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
        draws);
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def(
        "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
        "Tensor? rng_state=None) -> Tensor",
        tags);
    m.def(
        "_flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
        "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor",
        tags);
}

}  // namespace

TORCH_LIBRARY(flash_attn, m) {
    const auto define = [&](const std::string& schema) { m.def(schema.c_str(), {at::Tag::pt2_compliant_tag}); };
    define("fwd(Tensor q, Tensor k, Tensor v, " + kTail + ") -> (Tensor out, Tensor softmax_lse, Tensor max_logits)");
    define("fwd.out(Tensor q, Tensor k, Tensor v, " + kTail +
           ", Tensor(a!) out) -> (Tensor softmax_lse, Tensor max_logits)");
    const std::string bwd = kBackward + kTail + ", bool deterministic=False";
    define("bwd(" + bwd + ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsoftmax_sum)");
    define("bwd.out(" + bwd + ", Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> Tensor dsoftmax_sum");
    define("_explain(Tensor q, Tensor k, Tensor v, " + kTail + ") -> str[]");
    // Writes k and v, if given, into the caches.
    define("fwd_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, " + kKvCache +
           ") -> (Tensor out, Tensor softmax_lse)");
    // For tests: the part of fwd_kvcache on CUDA that writes and rotates. Returns q, rotated.
    define("_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, " + kKvCache + ") -> Tensor");
    define("attn_probs(Tensor q, Tensor k, Tensor softmax_lse, " + kTail + ") -> Tensor");
    // For what the ops of 2.8.3 cannot do: packed inputs (q, kv) or (qkv), whose gradient is one tensor, deterministic
    // gradients, and further arguments.
    define("_attention(Tensor[] inputs, " + kTail +
           ", bool deterministic=False) -> "
           "(Tensor out, Tensor softmax_lse, Tensor max_logits, Tensor rng_state)");
    define_original_ops(m);
}

TORCH_LIBRARY_IMPL(flash_attn, Meta, m) {
    implement_ops<fwd_meta, bwd_meta, attn_probs_meta>(m);
    m.impl("fwd_kvcache", KvCacheOps::run<fwd_kvcache_meta>);
}

}  // namespace flash_attn
