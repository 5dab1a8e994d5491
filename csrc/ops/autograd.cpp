// The ops are not differentiable by themselves: flash_attn.flash_attn_func is, through torch.autograd.Function. Asking
// an op for a derivative must raise, since torch's default is to go on without one, which ends in wrong gradients.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>
#include <array>
#include "ops/original_ops.h"

namespace flash_attn {
namespace {

constexpr const char* kUseFunctions =
    "the op alone has no backward; call flash_attn.flash_attn_func or flash_attn.flash_attn_varlen_func, which are "
    "differentiable once";

struct Fwd {
    using Signature = decltype(fwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::fwd";
    static constexpr const char* kNoBackward = kUseFunctions;
    static constexpr int kFirstWritten = -1;
};
struct Bwd {
    using Signature = decltype(bwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::bwd";
    static constexpr const char* kNoBackward =
        "gradients of gradients are not supported; where they are needed, use plain attention, such as "
        "torch.nn.functional.scaled_dot_product_attention with torch.nn.attention.SDPBackend.MATH";
    static constexpr int kFirstWritten = 7;
};
struct AttnProbs {
    using Signature = decltype(attn_probs_op<nullptr>);
    static constexpr const char* kName = "flash_attn::attn_probs";
    static constexpr const char* kNoBackward = kUseFunctions;
    static constexpr int kFirstWritten = -1;
};
struct OriginalFwd {
    using Signature = decltype(original_fwd_op<nullptr, nullptr>);
    static constexpr const char* kName = "flash_attn::_flash_attn_forward";
    static constexpr const char* kNoBackward = kUseFunctions;
    static constexpr int kFirstWritten = -1;
};
struct OriginalVarlenFwd {
    using Signature = decltype(original_varlen_fwd_op<nullptr, nullptr>);
    static constexpr const char* kName = "flash_attn::_flash_attn_varlen_forward";
    static constexpr const char* kNoBackward = kUseFunctions;
    static constexpr int kFirstWritten = -1;
};
struct OriginalBwd {
    using Signature = decltype(original_bwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::_flash_attn_backward";
    static constexpr const char* kNoBackward = Bwd::kNoBackward;
    static constexpr int kFirstWritten = 6;
};
struct OriginalVarlenBwd {
    using Signature = decltype(original_varlen_bwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::_flash_attn_varlen_backward";
    static constexpr const char* kNoBackward = Bwd::kNoBackward;
    static constexpr int kFirstWritten = 6;
};

// What any argument says about derivatives.
bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }
template <class T> bool requires_grad(const T&) { return false; }

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }
template <class T> bool has_tangent(const T&) { return false; }

// The results of an op that depend on its inputs differentiably.
std::array<const Tensor*, 2> results(const FwdResult& r) { return {&std::get<0>(r), &std::get<1>(r)}; }
std::array<const Tensor*, 2> results(const OriginalFwdResult& r) { return {&std::get<0>(r), &std::get<1>(r)}; }
std::array<const Tensor*, 1> results(const Tensor& r) { return {&r}; }

// The arguments that an op writes: dq, dk and dv, those that are there.
using Written = c10::SmallVector<const Tensor*, 3>;
void append_written(Written& written, const Tensor& t) { written.push_back(&t); }
void append_written(Written& written, const OptionalTensor& t) {
    if (t) written.push_back(&*t);
}
template <class Op, class... Args> Written written_arguments(const Args&... args) {
    Written written;
    if constexpr (Op::kFirstWritten >= 0) {
        constexpr size_t i = Op::kFirstWritten;
        const std::tuple<const Args&...> all(args...);
        append_written(written, std::get<i>(all));
        append_written(written, std::get<i + 1>(all));
        append_written(written, std::get<i + 2>(all));
    }
    return written;
}

void append_edge(torch::autograd::edge_list& edges, const Tensor& t) {
    if (t.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(t));
}
void append_edge(torch::autograd::edge_list& edges, const OptionalTensor& t) {
    if (t) append_edge(edges, *t);
}
template <class T> void append_edge(torch::autograd::edge_list&, const T&) {}

// An edge to a node that raises when backward reaches it. Nodes are held by one smart pointer in some releases of torch
// and by another one in others.
template <class Edge = torch::autograd::Edge>
Edge raising_edge(const char* op, const char* reason, torch::autograd::edge_list inputs, const Tensor& result) {
    using Pointer = decltype(Edge::function);
    auto* const error = new torch::autograd::Error(c10::str(op, ": ", reason), std::move(inputs));
    error->add_input_metadata(result);
    if constexpr (requires { Pointer::unsafe_steal_from_new(error); }) {
        return {Pointer::unsafe_steal_from_new(error), 0};
    } else {
        return {Pointer(error), 0};
    }
}

template <class Op, class Signature = typename Op::Signature> struct Autograd;

template <class Op, class Result, class... Args> struct Autograd<Op, Result(Args...)> {
    static Result run(c10::DispatchKeySet keys, Args... args) {
        TORCH_CHECK(!(has_tangent(args) || ...), Op::kName, ": forward-mode differentiation (torch.func.jvp, ",
                    "torch.autograd.forward_ad) is not supported; use reverse mode");
        const bool is_recorded = at::GradMode::is_enabled() && (requires_grad(args) || ...);
        return is_recorded ? call_recorded(keys, args...) : call(keys, std::forward<Args>(args)...);
    }

private:
    static Result call(c10::DispatchKeySet keys, Args... args) {
        static const auto op =
            c10::Dispatcher::singleton().findSchemaOrThrow(Op::kName, "").template typed<Result(Args...)>();
        at::AutoDispatchBelowAutograd guard;
        return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
    }
    // Makes all that the op computes depend on what it was given, for a backward pass to find and refuse.
    static Result call_recorded(c10::DispatchKeySet keys, const std::decay_t<Args>&... args) {
        const auto written = written_arguments<Op>(args...);
        for (const Tensor* t : written) torch::autograd::check_inplace(*t, /*requires_grad=*/true);
        torch::autograd::edge_list inputs;
        (append_edge(inputs, args), ...);
        Result result = call(keys, args...);
        for (const Tensor* t : results(result)) {
            torch::autograd::impl::set_gradient_edge(*t, raising_edge(Op::kName, Op::kNoBackward, inputs, *t));
        }
        for (const Tensor* t : written) {
            torch::autograd::impl::rebase_history(*t, raising_edge(Op::kName, Op::kNoBackward, inputs, *t));
        }
        return result;
    }
};

// Tells autograd that dq, dk and dv were written, for whoever saved them.
template <class Op, class Signature = typename Op::Signature> struct CountWrites;

template <class Op, class Result, class... Args> struct CountWrites<Op, Result(Args...)> {
    static Result run(c10::DispatchKeySet keys, Args... args) {
        static const auto op =
            c10::Dispatcher::singleton().findSchemaOrThrow(Op::kName, "").template typed<Result(Args...)>();
        Result result = [&] {
            at::AutoDispatchBelowADInplaceOrView guard;
            return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
        }();
        for (const Tensor* t : written_arguments<Op>(args...)) t->unsafeGetTensorImpl()->bump_version();
        return result;
    }
};

void no_vmap(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
    TORCH_CHECK(false, toString(op.operator_name()),
                ": torch.vmap is not supported; the first dimension of q, k and v ", "is a batch already");
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
    m.impl("fwd", Autograd<Fwd>::run);
    m.impl("bwd", Autograd<Bwd>::run);
    m.impl("attn_probs", Autograd<AttnProbs>::run);
    m.impl("_flash_attn_forward", Autograd<OriginalFwd>::run);
    m.impl("_flash_attn_varlen_forward", Autograd<OriginalVarlenFwd>::run);
    m.impl("_flash_attn_backward", Autograd<OriginalBwd>::run);
    m.impl("_flash_attn_varlen_backward", Autograd<OriginalVarlenBwd>::run);
}

TORCH_LIBRARY_IMPL(flash_attn, ADInplaceOrView, m) {
    m.impl("bwd", CountWrites<Bwd>::run);
    m.impl("_flash_attn_backward", CountWrites<OriginalBwd>::run);
    m.impl("_flash_attn_varlen_backward", CountWrites<OriginalVarlenBwd>::run);
}

TORCH_LIBRARY_IMPL(flash_attn, FuncTorchBatched, m) {
    for (const char* name : {"fwd", "bwd", "attn_probs", "_flash_attn_forward", "_flash_attn_varlen_forward",
                             "_flash_attn_backward", "_flash_attn_varlen_backward"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_vmap>());
    }
}

}  // namespace flash_attn
