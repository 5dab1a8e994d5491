// The ops are not differentiable by themselves: flash_attn.flash_attn_func is, through torch.autograd.Function. Asking an
// op for a derivative must raise, since torch's default is to go on without one, which ends in wrong gradients.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include "ops/arguments.h"

namespace flash_attn {
namespace {

using torch::autograd::variable_list;

struct Fwd {
    using Signature = decltype(fwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::fwd";
};
struct Bwd {
    using Signature = decltype(bwd_op<nullptr>);
    static constexpr const char* kName = "flash_attn::bwd";
};
struct AttnProbs {
    using Signature = decltype(attn_probs_op<nullptr>);
    static constexpr const char* kName = "flash_attn::attn_probs";
};

// What any argument says about derivatives.
bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }
template <class T> bool requires_grad(const T&) { return false; }

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }
template <class T> bool has_tangent(const T&) { return false; }

variable_list as_list(const FwdResult& result) { return {std::get<0>(result), std::get<1>(result)}; }
variable_list as_list(const Tensor& result) { return {result}; }
void from_list(const variable_list& list, FwdResult& result) { result = {list[0], list[1]}; }
void from_list(const variable_list& list, Tensor& result) { result = list[0]; }

// Runs an op so that a backward pass through its results raises.
template <class Op> struct NoBackward : torch::autograd::Function<NoBackward<Op>> {
    template <class Call, class... Args>
    static variable_list forward(torch::autograd::AutogradContext*, const Call& call, const Args&... args) {
        return as_list(call(args...));
    }
    static variable_list backward(torch::autograd::AutogradContext*, const variable_list&) {
        TORCH_CHECK(false, Op::kName, ": the op alone has no backward; call flash_attn.flash_attn_func or "
                    "flash_attn.flash_attn_varlen_func, which are differentiable once");
    }
};

template <class Op, class Signature = typename Op::Signature> struct Autograd;

template <class Op, class Result, class... Args> struct Autograd<Op, Result(Args...)> {
    static Result run(c10::DispatchKeySet keys, Args... args) {
        static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::kName, "").template typed<Result(Args...)>();
        TORCH_CHECK(!(has_tangent(args) || ...), Op::kName, ": forward-mode differentiation (torch.func.jvp, ",
                    "torch.autograd.forward_ad) is not supported; use reverse mode");
        const auto call = [keys](Args... args) {
            at::AutoDispatchBelowAutograd guard;
            return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
        };
        if (!(at::GradMode::is_enabled() && (requires_grad(args) || ...))) return call(std::forward<Args>(args)...);
        Result result;
        from_list(NoBackward<Op>::apply(call, args...), result);
        return result;
    }
};

// Tells autograd that dq, dk and dv were written, for whoever saved them.
template <class Signature> struct CountWrites;

template <class Result, class... Args> struct CountWrites<Result(Args...)> {
    static Result run(c10::DispatchKeySet keys, Args... args) {
        static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Bwd::kName, "").template typed<Result(Args...)>();
        const std::tuple<const Args&...> all(args...);
        const Tensor gradients[] = {std::get<7>(all), std::get<8>(all), std::get<9>(all)};
        Result result = [&] {
            at::AutoDispatchBelowADInplaceOrView guard;
            return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, std::forward<Args>(args)...);
        }();
        for (const Tensor& gradient : gradients) gradient.unsafeGetTensorImpl()->bump_version();
        return result;
    }
};

void no_vmap(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
    TORCH_CHECK(false, toString(op.operator_name()), ": torch.vmap is not supported; the first dimension of q, k and v ",
                "is a batch already");
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
    m.impl("fwd", Autograd<Fwd>::run);
    m.impl("bwd", Autograd<Bwd>::run);
    m.impl("attn_probs", Autograd<AttnProbs>::run);
}

TORCH_LIBRARY_IMPL(flash_attn, ADInplaceOrView, m) { m.impl("bwd", CountWrites<Bwd::Signature>::run); }

TORCH_LIBRARY_IMPL(flash_attn, FuncTorchBatched, m) {
    for (const char* name : {"fwd", "bwd", "attn_probs"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_vmap>());
    }
}

}  // namespace flash_attn
