// The arguments of the ops as named records. To add an argument of attention: extend kTail of ops/schema.cpp, add a
// field to AttentionArgs and add that field to AttentionArgs::fields.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymInt.h>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace flash_attn {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

// The trailing arguments that all of our ops share.
struct AttentionArgs {
    OptionalTensor cu_seqlens_q = {}, cu_seqlens_k = {};
    c10::SymInt max_seqlen_q = 0, max_seqlen_k = 0;  // dense: unused
    OptionalTensor seqused_k = {}, leftpad_k = {}, block_table = {}, alibi_slopes = {};
    std::optional<double> softmax_scale = {};
    bool causal = false;
    int64_t window_size_left = -1, window_size_right = -1, attention_chunk = 0;
    double softcap = 0;
    OptionalTensor s_aux = {};  // gets a gradient
    double dropout_p = 0;
    OptionalTensor rng_state = {};
    // Positions in a longer sequence: of every sequence or, as tensors, of each. Heads: of the dropout mask.
    std::optional<int64_t> q_start = {}, k_start = {};
    OptionalTensor q_starts = {}, k_starts = {};
    int64_t head_start = 0;
    std::optional<int64_t> total_heads = {};
    bool float_results = false;  // out, dq, dk and dv are not rounded to the dtype of q
    OptionalTensor key_ranges = {};
    bool return_max_logits = false;

    // References to all fields, in the order of declaration, which is the order of the schema.
    template <class Self> static auto fields(Self& a) {
        return std::tie(a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, a.seqused_k, a.leftpad_k,
                        a.block_table, a.alibi_slopes, a.softmax_scale, a.causal, a.window_size_left,
                        a.window_size_right, a.attention_chunk, a.softcap, a.s_aux, a.dropout_p, a.rng_state, a.q_start,
                        a.k_start, a.q_starts, a.k_starts, a.head_start, a.total_heads, a.float_results, a.key_ranges,
                        a.return_max_logits);
    }
    bool packed() const { return cu_seqlens_q.has_value() || cu_seqlens_k.has_value(); }
    // Whether the forward ops of flash_attn 2.8.3 accept these arguments.
    bool fits_original() const {
        return !rng_state && softmax_scale && !attention_chunk && (packed() || !seqused_k) && !has_positions() &&
               !head_start && !total_heads && !float_results && !s_aux && !key_ranges && !return_max_logits;
    }
    bool has_positions() const { return q_start || k_start || q_starts || k_starts; }
};

enum class Pass { kForward, kBackward, kProbs, kCache };

// The arguments that all passes share. Dense: q [batch_size, seqlen_q, num_heads, head_dim], k [batch_size, seqlen_k,
// num_heads_k, head_dim], v [batch_size, seqlen_k, num_heads_k, head_dim_v]. Packed, if cu_seqlens are given: q
// [total_q, num_heads, head_dim], k [total_k, ...]. Paged: k [num_pages, page_size, num_heads_k, head_dim].
struct ProblemArgs : AttentionArgs {
    Pass pass;
    const Tensor& q;
    const Tensor& k;
    const Tensor* v;  // null in attn_probs
};

struct FwdArgs {
    ProblemArgs problem;
    const Tensor* out = nullptr;  // where results go; null: new memory
};

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

using FwdResult = std::tuple<Tensor, Tensor, Tensor>;  // out, softmax_lse, max_logits: undefined if not asked for
using FwdOutResult = std::tuple<Tensor, Tensor>;       // softmax_lse, max_logits
using CacheResult = std::tuple<Tensor, Tensor>;        // out, softmax_lse
using BwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;        // dq, dk, dv, dsoftmax_sum
using AttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, softmax_lse, max_logits, rng_state

// Uninitialised memory for the gradient of a tensor. is_float: not of its dtype, but float32 (float64 for float64).
inline Tensor gradient_buffer(const Tensor& of, bool is_float = false) {
    const bool as_float = is_float && of.scalar_type() != at::kDouble;
    return at::empty_symint(of.sym_sizes(), as_float ? of.options().dtype(at::kFloat) : of.options());
}

// Implementation of the ops for one dispatch key. bwd fills dq, dk and dv, and returns dsoftmax_sum.
using FwdImplementation = FwdResult (*)(const FwdArgs&);
using BwdImplementation = Tensor (*)(const BwdArgs&);
using ProbsImplementation = Tensor (*)(const ProbsArgs&);
// Name of the backend that runs a forward pass, then for each better backend its name and why it was not chosen.
using Names = std::vector<std::string>;
using ExplainImplementation = Names (*)(const FwdArgs&);

// Our ops with the signatures that the dispatcher calls. Tail: the types of the fields of AttentionArgs.
template <class... Tail> struct OpsWithTail {
    template <FwdImplementation fwd>
    static FwdResult run_fwd(const Tensor& q, const Tensor& k, const Tensor& v, Tail... tail) {
        return fwd_all<fwd>({{{tail...}, Pass::kForward, q, k, &v}});
    }
    template <FwdImplementation fwd> static FwdOutResult run_fwd_out(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     Tail... tail, const Tensor& out) {
        auto [written, softmax_lse, max_logits] = fwd_all<fwd>({{{tail...}, Pass::kForward, q, k, &v}, &out});
        return {std::move(softmax_lse), std::move(max_logits)};
    }
    template <BwdImplementation bwd>
    static BwdResult run_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor& softmax_lse, const OptionalTensor& dlse, Tail... tail, bool deterministic) {
        const ProblemArgs problem{{tail...}, Pass::kBackward, q, k, &v};
        Tensor dq = gradient_buffer(q, problem.float_results), dk = gradient_buffer(k, problem.float_results),
               dv = gradient_buffer(v, problem.float_results);
        Tensor dsoftmax_sum = bwd({problem, dout, dlse, out, softmax_lse, dq, dk, dv, deterministic});
        return {std::move(dq), std::move(dk), std::move(dv), std::move(dsoftmax_sum)};
    }
    template <BwdImplementation bwd>
    static Tensor run_bwd_out(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                              const Tensor& softmax_lse, const OptionalTensor& dlse, Tail... tail, bool deterministic,
                              const Tensor& dq, const Tensor& dk, const Tensor& dv) {
        return bwd({{{tail...}, Pass::kBackward, q, k, &v}, dout, dlse, out, softmax_lse, dq, dk, dv, deterministic});
    }
    template <ProbsImplementation attn_probs>
    static Tensor run_attn_probs(const Tensor& q, const Tensor& k, const Tensor& softmax_lse, Tail... tail) {
        return attn_probs({{{tail...}, Pass::kProbs, q, k, nullptr}, softmax_lse});
    }
    template <ExplainImplementation explain>
    static Names run_explain(const Tensor& q, const Tensor& k, const Tensor& v, Tail... tail) {
        return explain({{{tail...}, Pass::kForward, q, k, &v}});
    }

private:
    // With an empty tensor for what is not asked for: ops cannot return undefined ones.
    template <FwdImplementation fwd> static FwdResult fwd_all(const FwdArgs& args) {
        FwdResult result = fwd(args);
        Tensor& max_logits = std::get<2>(result);
        if (!max_logits.defined()) max_logits = at::empty({0}, std::get<1>(result).options());
        return result;
    }
};

template <class Field> using PassedAs =
    std::conditional_t<std::is_same_v<Field, OptionalTensor>, const OptionalTensor&, Field>;

// Template<Tail...>, with the types of the fields of AttentionArgs as Tail.
template <template <class...> class Template,
          class Fields = decltype(AttentionArgs::fields(std::declval<AttentionArgs&>()))>
struct WithTail;
template <template <class...> class Template, class... Field> struct WithTail<Template, std::tuple<Field&...>>
    : Template<PassedAs<Field>...> {};

using Ops = WithTail<OpsWithTail>;

}  // namespace flash_attn
