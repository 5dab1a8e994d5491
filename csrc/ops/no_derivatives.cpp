// Autograd kernels of the ops without derivatives, and vmap, which no op supports. Schemas mark written arguments.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>
#include <algorithm>
#include "ops/derivatives.h"
#include "ops/reasons.h"

namespace flash_attn {
namespace {

using Stack = torch::jit::Stack;
using Tensors = c10::SmallVector<at::Tensor, 4>;

std::string name_of(const c10::OperatorHandle& op) { return op.schema().operator_name().name; }

// The tensor arguments that satisfy the predicate.
template <class Predicate> Tensors arguments(const c10::OperatorHandle& op, const Stack& stack, Predicate predicate) {
    Tensors tensors;
    const auto& names = op.schema().arguments();
    const auto values = torch::jit::last(stack, names.size());
    for (size_t i = 0; i < names.size(); ++i) {
        if (values[i].isTensor() && predicate(names[i], values[i].toTensor())) tensors.push_back(values[i].toTensor());
    }
    return tensors;
}

Tensors written_arguments(const c10::OperatorHandle& op, const Stack& stack) {
    return arguments(op, stack, [](const c10::Argument& argument, const at::Tensor&) {
        return argument.alias_info() && argument.alias_info()->isWrite();
    });
}

// Connects all outputs to a node that raises in backward.
template <const char* reason>
void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Tensors sources = arguments(op, *stack, [&](const c10::Argument&, const at::Tensor& t) {
        refuse_tangent(name_of(op), t);
        return t.requires_grad();
    });
    const bool is_recorded = at::GradMode::is_enabled() && !sources.empty();
    const Tensors written = is_recorded ? written_arguments(op, *stack) : Tensors();
    for (const at::Tensor& t : written) torch::autograd::check_inplace(t, /*requires_grad=*/true);
    torch::autograd::edge_list inputs;
    for (const at::Tensor& t : sources) append_edge(inputs, t);
    {
        at::AutoDispatchBelowAutograd guard;
        op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    if (!is_recorded) return;
    for (const c10::IValue& value : torch::jit::last(*stack, op.schema().returns().size())) {
        const at::Tensor& t = value.toTensor();
        torch::autograd::impl::set_gradient_edge(t, raising_edge(name_of(op), reason, inputs, t));
    }
    for (const at::Tensor& t : written) {
        torch::autograd::impl::rebase_history(t, raising_edge(name_of(op), reason, inputs, t));
    }
}

// An op that writes into its inputs and has no backward pass: fails at once where autograd would record it.
void refuse_inputs_with_grad(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    Reasons reasons(Pass::kCache, /*packed=*/false);
    arguments(op, *stack, [&](const c10::Argument& argument, const at::Tensor& t) {
        refuse_tangent(name_of(op), t);
        if (at::GradMode::is_enabled() && t.requires_grad()) {
            reasons.add(argument.name(),
                        "a tensor that does not require grad, for attention with a cache has no gradient (call it "
                        "under torch.no_grad() or torch.inference_mode(), or use flash_attn_func)",
                        "requires_grad=True");
        }
        return false;
    });
    reasons.raise_if_any();
    at::AutoDispatchBelowAutograd guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// Whether a call writes its written arguments: a KV cache is only read if there are no new rows.
bool writes(const c10::OperatorHandle& op, const Stack& stack) {
    const auto& names = op.schema().arguments();
    const auto k = std::find_if(names.begin(), names.end(), [](const auto& each) { return each.name() == "k"; });
    return k == names.end() || !torch::jit::last(stack, names.size())[k - names.begin()].isNone();
}

// Bumps the version counters of the tensors that the op writes, so that autograd detects stale saved tensors.
void count_writes(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Tensors written = writes(op, *stack) ? written_arguments(op, *stack) : Tensors();
    for (const at::Tensor& t : written) {
        TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), name_of(op),
                    ": a tensor made in inference mode can be written in inference mode only; make it outside, or call "
                    "this under torch.inference_mode()");
    }
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    }
    for (const at::Tensor& t : written) t.unsafeGetTensorImpl()->bump_version();
}

void refuse_vmap(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack*) {
    TORCH_CHECK(false, name_of(op), ": torch.vmap is not supported; the first dimension of q, k and v is a batch ",
                "already");
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
    for (const char* name : {"fwd.out", "attn_probs"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives<kUseFunctions>>());
    }
    for (const char* name : {"fwd_kvcache", "_append"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_inputs_with_grad>());
    }
    for (const char* name : {"bwd", "bwd.out", "_flash_attn_backward", "_flash_attn_varlen_backward"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives<kOnlyOnce>>());
    }
}

TORCH_LIBRARY_IMPL(flash_attn, ADInplaceOrView, m) {
    for (const char* name :
         {"fwd.out", "bwd.out", "fwd_kvcache", "_append", "_flash_attn_backward", "_flash_attn_varlen_backward"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&count_writes>());
    }
}

TORCH_LIBRARY_IMPL(flash_attn, FuncTorchBatched, m) {
    for (const char* name :
         {"fwd", "fwd.out", "bwd", "bwd.out", "attn_probs", "_attention", "fwd_kvcache", "_append",
          "_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward", "_flash_attn_varlen_backward"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
    }
}

}  // namespace flash_attn
