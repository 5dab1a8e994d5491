// The Autograd kernels of the attention ops: they attach the backward node of backward_node.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#include "ops/attention.h"
#include "ops/backward_node.h"
#include "ops/calls.h"
#include "ops/derivatives.h"
#include "ops/reasons.h"

namespace flash_attn {
namespace {

void check_inputs(const char* op, at::TensorList inputs, const AttentionArgs& args) {
    for (const Tensor& t : inputs) refuse_tangent(op, t);
    if (args.s_aux) refuse_tangent(op, *args.s_aux);
    if (!args.alibi_slopes) return;
    refuse_tangent(op, *args.alibi_slopes);
    if (!at::GradMode::is_enabled() || !args.alibi_slopes->requires_grad()) return;
    Reasons reasons(Pass::kForward, args.packed());
    reasons.add("alibi_slopes",
                "a tensor that does not require grad, since slopes get no gradient (pass alibi_slopes.detach())",
                "requires_grad=True");
    reasons.raise_if_any();
}

bool requires_grad(at::TensorList inputs, const AttentionArgs& args) {
    if (!at::GradMode::is_enabled()) return false;
    if (args.s_aux && args.s_aux->requires_grad()) return true;
    for (const Tensor& t : inputs) {
        if (t.requires_grad()) return true;
    }
    return false;
}

// Attaches a node that raises in backward: paged keys have no gradients.
void record_refusal(const char* op, at::TensorList inputs, const AttentionArgs& args, const Tensor& result) {
    torch::autograd::edge_list edges;
    for (const Tensor& t : inputs) append_edge(edges, t);
    if (args.s_aux) append_edge(edges, *args.s_aux);
    torch::autograd::impl::set_gradient_edge(result, raising_edge(op, kUseFunctions, std::move(edges), result));
}

// The dropout state that an op drew, if it returns one.
const Tensor* drawn_state(const FwdResult&) { return nullptr; }
static_assert(std::is_same_v<AttentionResult, OriginalFwdResult>);
const Tensor* drawn_state(const AttentionResult& result) { return &std::get<3>(result); }

// Calls an op below the Autograd key and attaches a backward node to its results.
template <class Call> auto differentiate(const char* op, at::TensorList inputs, AttentionArgs args, BackwardOps ops,
                                         bool deterministic, Call call) {
    check_inputs(op, inputs, args);
    auto result = [&] {
        at::AutoDispatchBelowAutograd guard;
        return call();
    }();
    if (!requires_grad(inputs, args)) return result;
    const Tensor &out = std::get<0>(result), &softmax_lse = std::get<1>(result);
    if (args.block_table) {
        record_refusal(op, inputs, args, out);
        record_refusal(op, inputs, args, softmax_lse);
        return result;
    }
    const Tensor* drawn = drawn_state(result);
    if (drawn && args.dropout_p > 0) args.rng_state = *drawn;
    FlashAttentionBackward::record(inputs, args, out, softmax_lse, ops, deterministic);
    return result;
}

constexpr char kDense[] = "flash_attn::_flash_attn_forward", kVarlen[] = "flash_attn::_flash_attn_varlen_forward";

// An op of 2.8.3. Its schema has no `deterministic`, so the node does not know it.
template <const char* name, auto unpack, class Unpack = decltype(unpack)> struct Original;
template <const char* name, auto unpack, class... Args> struct Original<name, unpack, OriginalFwdArgs (*)(Args...)> {
    static OriginalFwdResult run(c10::DispatchKeySet keys, Args... args) {
        static const auto op = find_op<OriginalFwdResult(Args...)>(name);
        const OriginalFwdArgs unpacked = unpack(args...);
        const ProblemArgs& p = unpacked.problem;
        return differentiate(name, std::array<Tensor, 3>{p.q, p.k, *p.v}, p, BackwardOps::kOriginal, false,
                             [&] { return op.redispatch(keys & c10::after_autograd_keyset, args...); });
    }
};

// Calls the op of 2.8.3 where possible, since other programs look for it by name; otherwise ours.
AttentionResult run_attention(at::TensorList inputs, AttentionArgs args) {
    static const auto dense = find_op<DenseFwd>(kDense);
    static const auto varlen = find_op<VarlenFwd>(kVarlen);
    static const auto fwd = find_op<Signatures::Fwd>("flash_attn::fwd");
    const auto [q, k, v] = split_inputs(inputs);
    if (!args.fits_original()) {
        if (args.dropout_p > 0 && !args.rng_state) args.rng_state = draw_rng_state(q);
        auto [out, softmax_lse, max_logits] =
            std::apply([&, &q = q, &k = k, &v = v](const auto&... tail) { return fwd.call(q, k, v, tail...); },
                       AttentionArgs::fields(args));
        // Not no_rng_state(), which writes to memory: the tensors may be fake here.
        Tensor rng_state = args.rng_state ? *args.rng_state : at::zeros({2}, q.options().dtype(at::kLong));
        return {std::move(out), std::move(softmax_lse), std::move(max_logits), std::move(rng_state)};
    }
    auto [out, softmax_lse, s_dmask, rng_state] =
        args.packed()
            ? varlen.call(q, k, v, *args.cu_seqlens_q, *args.cu_seqlens_k, args.max_seqlen_q, args.max_seqlen_k,
                          args.dropout_p, *args.softmax_scale, args.causal, args.window_size_left,
                          args.window_size_right, args.softcap, args.alibi_slopes, /*return_softmax=*/false,
                          args.block_table, args.leftpad_k, args.seqused_k, /*zero_tensors=*/false)
            : dense.call(q, k, v, args.dropout_p, *args.softmax_scale, args.causal, args.window_size_left,
                         args.window_size_right, args.softcap, args.alibi_slopes, /*return_softmax=*/false);
    Tensor no_max_logits = at::empty({0}, softmax_lse.options());
    return {std::move(out), std::move(softmax_lse), std::move(no_max_logits), std::move(rng_state)};
}

template <class... Tail> struct AttentionSignature { using type = AttentionResult(at::TensorList, Tail..., bool); };

template <class... Tail> struct DifferentiableOps {
    static FwdResult fwd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& v, Tail... tail) {
        static const auto op = find_op<Signatures::Fwd>("flash_attn::fwd");
        return differentiate("flash_attn::fwd", std::array<Tensor, 3>{q, k, v}, {tail...}, BackwardOps::kOurs, false,
                             [&] { return op.redispatch(keys & c10::after_autograd_keyset, q, k, v, tail...); });
    }
    static AttentionResult attention(at::TensorList inputs, Tail... tail, bool deterministic) {
        const AttentionArgs args{tail...};
        const BackwardOps ops = args.fits_original() ? BackwardOps::kOriginal : BackwardOps::kOurs;
        return differentiate("flash_attn::_attention", inputs, args, ops, deterministic,
                             [&] { return run_attention(inputs, args); });
    }
    static AttentionResult plain_attention(at::TensorList inputs, Tail... tail, bool /*deterministic*/) {
        return run_attention(inputs, {tail...});
    }
};
using Differentiable = WithTail<DifferentiableOps>;

}  // namespace

AttentionResult attention(at::TensorList inputs, const AttentionArgs& args, bool deterministic) {
    static const auto op = find_op<WithTail<AttentionSignature>::type>("flash_attn::_attention");
    if (!requires_grad(inputs, args) || (inputs.size() == 3 && !deterministic && args.fits_original())) {
        return run_attention(inputs, args);
    }
    return std::apply([&](const auto&... tail) { return op.call(inputs, tail..., deterministic); },
                      AttentionArgs::fields(args));
}

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
    m.impl("fwd", Differentiable::fwd);
    m.impl("_attention", Differentiable::attention);
    m.impl("_flash_attn_forward", Original<kDense, dense_fwd_args>::run);
    m.impl("_flash_attn_varlen_forward", Original<kVarlen, varlen_fwd_args>::run);
}

TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) { m.impl("_attention", Differentiable::plain_attention); }

}  // namespace flash_attn
