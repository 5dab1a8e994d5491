#include "ops/backward_node.h"
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include "ops/calls.h"
#include "ops/derivatives.h"

namespace flash_attn {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

using Three = std::array<Tensor, 3>;

// The reverse of split_inputs, by copying.
variable_list join_inputs(const Three& parts, size_t num_inputs) {
    const auto& [q, k, v] = parts;
    if (num_inputs == 3) return {q, k, v};
    if (num_inputs == 2) return {q, at::stack({k, v}, -3)};
    return {at::stack({q, k, v}, -3)};
}

template <class F> void for_each_tensor(AttentionArgs& args, F&& f) {
    const auto visit = [&](auto& field) {
        if constexpr (std::is_same_v<decltype(field), OptionalTensor&>) f(field);
    };
    std::apply([&](auto&... field) { (visit(field), ...); }, AttentionArgs::fields(args));
}

}  // namespace

Three split_inputs(at::TensorList inputs) {
    if (inputs.size() == 3) return {inputs[0], inputs[1], inputs[2]};
    const Tensor& packed = inputs.back();
    if (inputs.size() == 2) return {inputs[0], packed.select(-3, 0), packed.select(-3, 1)};
    return {packed.select(-3, 0), packed.select(-3, 1), packed.select(-3, 2)};
}

struct FlashAttentionBackward::Call {
    variable_list inputs;
    Three qkv;
    Tensor out, softmax_lse, dout;
    OptionalTensor dlse;
    AttentionArgs args;
    BackwardOps ops;
    bool deterministic;

    // The gradients of the inputs.
    variable_list gradients() const {
        // The gradient of a packed input is written in one piece, through views of it. Not where autograd looks on
        // (create_graph), which lets nobody write to views of no history.
        if (inputs.size() < 3 && !at::GradMode::is_enabled()) {
            variable_list whole;
            for (const Tensor& x : inputs) whole.push_back(gradient_buffer(x));
            write(split_inputs(whole));
            return whole;
        }
        if (ops == BackwardOps::kOurs) return join_inputs(compute(), inputs.size());
        const Three parts{gradient_buffer(qkv[0]), gradient_buffer(qkv[1]), gradient_buffer(qkv[2])};
        write(parts);
        return join_inputs(parts, inputs.size());
    }

private:
    Three compute() const {
        static const auto bwd = find_op<Signatures::Bwd>("flash_attn::bwd");
        const auto& [q, k, v] = qkv;
        auto [dq, dk, dv, dsoftmax_sum] = std::apply(
            [&](const auto&... tail) {
                return bwd.call(dout, q, k, v, out, softmax_lse, dlse, tail..., deterministic);
            },
            AttentionArgs::fields(args));
        return {std::move(dq), std::move(dk), std::move(dv)};
    }
    void write(const Three& gradients) const {
        if (ops == BackwardOps::kOurs) return write_by_our_op(gradients);
        args.packed() ? write_by_original_varlen_op(gradients) : write_by_original_op(gradients);
    }
    void write_by_our_op(const Three& gradients) const {
        static const auto bwd = find_op<Signatures::BwdOut>("flash_attn::bwd", "out");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        std::apply(
            [&](const auto&... tail) {
                bwd.call(dout, q, k, v, out, softmax_lse, dlse, tail..., deterministic, dq, dk, dv);
            },
            AttentionArgs::fields(args));
    }
    void write_by_original_op(const Three& gradients) const {
        static const auto bwd = find_op<DenseBwd>("flash_attn::_flash_attn_backward");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        bwd.call(dout, q, k, v, out, softmax_lse, dq, dk, dv, args.dropout_p, *args.softmax_scale, args.causal,
                 args.window_size_left, args.window_size_right, args.softcap, args.alibi_slopes, deterministic,
                 args.rng_state);
    }
    void write_by_original_varlen_op(const Three& gradients) const {
        static const auto bwd = find_op<VarlenBwd>("flash_attn::_flash_attn_varlen_backward");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        bwd.call(dout, q, k, v, out, softmax_lse, dq, dk, dv, *args.cu_seqlens_q, *args.cu_seqlens_k, args.max_seqlen_q,
                 args.max_seqlen_k, args.dropout_p, *args.softmax_scale, args.causal, args.window_size_left,
                 args.window_size_right, args.softcap, args.alibi_slopes, deterministic, args.rng_state,
                 /*zero_tensors=*/false);
    }
};

void FlashAttentionBackward::record(at::TensorList inputs, const AttentionArgs& args, const Tensor& out,
                                    const Tensor& softmax_lse, BackwardOps ops, bool deterministic) {
    auto* const node = new FlashAttentionBackward(args, ops, deterministic);
    const auto pointer = held(node);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    torch::autograd::set_history(out, pointer);
    torch::autograd::set_history(softmax_lse, pointer);
    node->save(inputs, out, softmax_lse);
}

void FlashAttentionBackward::save(at::TensorList inputs, const Tensor& out, const Tensor& softmax_lse) {
    inputs_.reserve(inputs.size());
    for (const Tensor& x : inputs) inputs_.emplace_back(x, /*is_output=*/false);
    out_ = SavedVariable(out, /*is_output=*/true);
    softmax_lse_ = SavedVariable(softmax_lse, /*is_output=*/true);
    for_each_tensor(args_, [&](OptionalTensor& tensor) {
        args_tensors_.emplace_back(tensor, /*is_output=*/false);
        tensor.reset();
    });
}

FlashAttentionBackward::Call FlashAttentionBackward::unpack() {
    Call call;
    for (const SavedVariable& x : inputs_) call.inputs.push_back(x.unpack());
    call.qkv = split_inputs(call.inputs);
    call.out = out_.unpack(getptr());
    call.softmax_lse = softmax_lse_.unpack(getptr());
    call.args = args_;
    auto saved = args_tensors_.begin();
    for_each_tensor(call.args, [&](OptionalTensor& tensor) {
        Tensor unpacked = (saved++)->unpack();
        if (unpacked.defined()) tensor = std::move(unpacked);
    });
    return call;
}

variable_list FlashAttentionBackward::apply(variable_list&& grads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Call call = unpack();
    call.dout = grads[0].defined() ? std::move(grads[0]) : at::zeros_like(call.out);
    if (grads[1].defined()) call.dlse = std::move(grads[1]);
    const bool fits_original = !call.dlse && !call.args.seqused_k && !call.args.leftpad_k;
    call.ops = fits_original ? ops_ : BackwardOps::kOurs;
    call.deterministic = deterministic_ || at::globalContext().deterministicAlgorithms();
    variable_list gradients = call.gradients();
    for (size_t i = 0; i < gradients.size(); ++i) {
        if (!task_should_compute_output(i)) gradients[i].reset();
    }
    return gradients;
}

void FlashAttentionBackward::release_variables() {
    const std::lock_guard<std::mutex> lock(mutex_);
    out_.reset_data();
    softmax_lse_.reset_data();
    for (SavedVariable& x : inputs_) x.reset_data();
    for (SavedVariable& x : args_tensors_) x.reset_data();
}

}  // namespace flash_attn
