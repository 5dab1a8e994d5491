#include "ops/backward_node.h"
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include "ops/calls.h"
#include "ops/derivatives.h"
#include "ops/results.h"

namespace flash_attn {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

using Qkv = std::array<Tensor, 3>;

// The inverse of split_inputs: concatenates copies.
variable_list join_inputs(const Qkv& parts, size_t num_inputs) {
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

Qkv split_inputs(at::TensorList inputs) {
    if (inputs.size() == 3) return {inputs[0], inputs[1], inputs[2]};
    const Tensor& packed = inputs.back();
    if (inputs.size() == 2) return {inputs[0], packed.select(-3, 0), packed.select(-3, 1)};
    return {packed.select(-3, 0), packed.select(-3, 1), packed.select(-3, 2)};
}

namespace {

// Sums of the rows of a matrix, in blocks: the order in which torch adds up a single long row depends on the number of
// threads.
Tensor sum_rows(const Tensor& x) {
    const c10::SymInt block = 1024, blocks = (x.sym_size(1) + block - 1) / block;
    const Tensor padded = at::constant_pad_nd_symint(x, {0, blocks * block - x.sym_size(1)});
    return padded.view_symint({x.sym_size(0), blocks, block}).sum(-1).sum(-1);
}

// One recorded forward call, and the gradients that autograd asks for.
struct Call {
    variable_list inputs;
    Qkv qkv;
    Tensor out, softmax_lse, dout;
    OptionalTensor dlse;
    AttentionArgs args;
    BackwardOps ops;
    bool deterministic, needs_sinks;

    // tensors: those that the node saved.
    Call(const variable_list& tensors, size_t num_inputs, AttentionArgs args, BackwardOps ops, bool deterministic,
         bool needs_sinks)
        : inputs(tensors.begin(), tensors.begin() + num_inputs), qkv(split_inputs(inputs)), out(tensors[num_inputs]),
          softmax_lse(tensors[num_inputs + 1]), args(std::move(args)), ops(ops), deterministic(deterministic),
          needs_sinks(needs_sinks) {
        auto next = tensors.begin() + num_inputs + 2;
        for_each_tensor(this->args, [&](OptionalTensor& tensor) {
            if (next->defined()) tensor = *next;
            ++next;
        });
    }

    // Gradients of the inputs and, if given, of s_aux, from grads = those of out and softmax_lse, each possibly
    // undefined.
    variable_list differentiate(const variable_list& grads) {
        dout = grads[0].defined() ? grads[0] : at::zeros_like(out);
        if (grads[1].defined()) dlse = grads[1];
        if (dlse || args.seqused_k || args.leftpad_k) ops = BackwardOps::kOurs;
        if (args.float_results) round_to_inputs();
        variable_list all = gradients();
        if (args.s_aux) all.push_back(needs_sinks ? sinks_gradient() : Tensor());
        return all;
    }

private:
    // Kernels read out and dout as elements, and gradients have the dtype of their tensors.
    void round_to_inputs() {
        args.float_results = false;
        out = out.to(qkv[0].scalar_type());
        dout = dout.to(qkv[0].scalar_type());
    }
    variable_list gradients() {
        // The gradient of a packed input (kv or qkv) is allocated once and written through views. Not under
        // create_graph, where autograd forbids writes to views without history.
        if (inputs.size() < 3 && !at::GradMode::is_enabled()) {
            variable_list whole;
            for (const Tensor& x : inputs) whole.push_back(gradient_buffer(x));
            write(split_inputs(whole));
            return whole;
        }
        if (ops == BackwardOps::kOurs) return join_inputs(compute(), inputs.size());
        const Qkv parts{gradient_buffer(qkv[0]), gradient_buffer(qkv[1]), gradient_buffer(qkv[2])};
        write(parts);
        return join_inputs(parts, inputs.size());
    }
    Qkv compute() {
        static const auto bwd = find_op<Signatures::Bwd>("flash_attn::bwd");
        const auto& [q, k, v] = qkv;
        Qkv gradients;
        auto& [dq, dk, dv] = gradients;
        std::tie(dq, dk, dv, dsoftmax_sum) = std::apply(
            [&, &q = q, &k = k, &v = v](const auto&... tail) {
                return bwd.call(dout, q, k, v, out, softmax_lse, dlse, tail..., deterministic);
            },
            AttentionArgs::fields(args));
        return gradients;
    }
    void write(const Qkv& gradients) {
        if (ops == BackwardOps::kOurs) return write_by_our_op(gradients);
        args.packed() ? write_by_original_varlen_op(gradients) : write_by_original_op(gradients);
    }
    void write_by_our_op(const Qkv& gradients) {
        static const auto bwd = find_op<Signatures::BwdOut>("flash_attn::bwd", "out");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        dsoftmax_sum = std::apply(
            [&](const auto&... tail) {
                return bwd.call(dout, q, k, v, out, softmax_lse, dlse, tail..., deterministic, dq, dk, dv);
            },
            AttentionArgs::fields(args));
    }
    void write_by_original_op(const Qkv& gradients) const {
        static const auto bwd = find_op<DenseBwd>("flash_attn::_flash_attn_backward");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        bwd.call(dout, q, k, v, out, softmax_lse, dq, dk, dv, args.dropout_p, *args.softmax_scale, args.causal,
                 args.window_size_left, args.window_size_right, args.softcap, args.alibi_slopes, deterministic,
                 args.rng_state);
    }
    void write_by_original_varlen_op(const Qkv& gradients) const {
        static const auto bwd = find_op<VarlenBwd>("flash_attn::_flash_attn_varlen_backward");
        const auto& [q, k, v] = qkv;
        const auto& [dq, dk, dv] = gradients;
        bwd.call(dout, q, k, v, out, softmax_lse, dq, dk, dv, *args.cu_seqlens_q, *args.cu_seqlens_k, args.max_seqlen_q,
                 args.max_seqlen_k, args.dropout_p, *args.softmax_scale, args.causal, args.window_size_left,
                 args.window_size_right, args.softcap, args.alibi_slopes, deterministic, args.rng_state,
                 /*zero_tensors=*/false);
    }
    // A sink is a key without value, of weight exp(sink - lse): the derivative of its score is -weight * dsoftmax_sum,
    // summed over all rows of the head. Rows outside sequences have no weights.
    Tensor sinks_gradient() const {
        const Tensor weight = args.s_aux->to(softmax_lse.scalar_type()).unsqueeze(1).sub(softmax_lse).exp();
        const Tensor each = weight.mul(dsoftmax_sum).masked_fill(softmax_lse.eq(-kInfinity), 0);
        const Tensor rows = args.packed() ? each : each.transpose(0, 1).flatten(1);  // [num_heads, rows]
        return sum_rows(rows).neg().to(args.s_aux->scalar_type());
    }

    Tensor dsoftmax_sum;
};

void keep_needed(variable_list& gradients, const std::vector<bool>& needed) {
    for (size_t i = 0; i < gradients.size(); ++i) {
        if (!needed[i]) gradients[i].reset();
    }
}

}  // namespace

void FlashAttentionBackward::record(at::TensorList inputs, const AttentionArgs& args, const Tensor& out,
                                    const Tensor& softmax_lse, BackwardOps ops, bool deterministic) {
    auto* const node = new FlashAttentionBackward(inputs.size(), args, ops, deterministic);
    const auto pointer = node_pointer(node);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    if (args.s_aux) node->add_next_edge(torch::autograd::impl::gradient_edge(*args.s_aux));
    torch::autograd::set_history(out, pointer);
    torch::autograd::set_history(softmax_lse, pointer);
    node->saved_.reserve(inputs.size() + 2 + std::tuple_size_v<decltype(AttentionArgs::fields(node->args_))>);
    for (const Tensor& x : inputs) node->save(x, /*is_output=*/false);
    node->save(out, /*is_output=*/true);
    node->save(softmax_lse, /*is_output=*/true);
    for_each_tensor(node->args_, [&](OptionalTensor& tensor) {
        node->save(tensor.value_or(Tensor()), /*is_output=*/false);
        tensor.reset();
    });
}

variable_list FlashAttentionBackward::unpack() {
    variable_list tensors;
    tensors.reserve(saved_.size());
    for (const SavedVariable& x : saved_) tensors.push_back(x.unpack(getptr()));
    return tensors;
}

bool FlashAttentionBackward::is_deterministic() const {
    return deterministic_ || at::globalContext().deterministicAlgorithms();
}

std::vector<bool> FlashAttentionBackward::needed() const {
    std::vector<bool> needed;
    for (size_t i = 0; i < num_outputs(); ++i) needed.push_back(task_should_compute_output(i));
    return needed;
}

variable_list FlashAttentionBackward::apply(variable_list&& grads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<bool> is_needed = needed();
    Call call(unpack(), num_inputs_, args_, ops_, is_deterministic(), is_needed.back());
    variable_list gradients = call.differentiate(grads);
    keep_needed(gradients, is_needed);
    return gradients;
}

void FlashAttentionBackward::release_variables() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& x : saved_) x.reset_data();
}

// The cache key of compiled autograd: it compiles one graph for each distinct set of values collected here.
void FlashAttentionBackward::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    args.collect(saved_, /*is_output=*/true);
    std::apply([&](const auto&... field) { (args.collect(field), ...); }, AttentionArgs::fields(args_));
    args.collect(ops_ == BackwardOps::kOurs);
    args.collect(is_deterministic());
}

// Traces a call of a function of the values that vary between calls: gradients, saved tensors and max_seqlens.
variable_list FlashAttentionBackward::apply_with_saved(const variable_list& grads,
                                                       torch::dynamo::autograd::SwapSavedVariables& saved) {
    using torch::dynamo::autograd::PackedArgs;
    saved.before(saved_), saved.before(args_.max_seqlen_q), saved.before(args_.max_seqlen_k);
    variable_list given;
    std::vector<bool> is_given;
    for (Tensor& x : unpack()) {
        is_given.push_back(x.defined());
        if (x.defined()) given.push_back(std::move(x));
    }
    PackedArgs packed;
    packed.pack(given), packed.pack(args_.max_seqlen_q), packed.pack(args_.max_seqlen_k);
    const auto run = [num_inputs = num_inputs_, args = args_, ops = ops_, deterministic = is_deterministic(),
                      needed = needed(), is_given](const variable_list& grads, const std::vector<c10::IValue>& values) {
        PackedArgs packed(values);
        const auto given = packed.unpack<variable_list>();
        AttentionArgs own = args;
        own.max_seqlen_q = packed.unpack<c10::SymInt>();
        own.max_seqlen_k = packed.unpack<c10::SymInt>();
        variable_list tensors;
        auto next = given.begin();
        for (const bool is : is_given) tensors.push_back(is ? *next++ : Tensor());
        variable_list gradients =
            Call(tensors, num_inputs, own, ops, deterministic, needed.back()).differentiate(grads);
        keep_needed(gradients, needed);
        return gradients;
    };
    const auto values = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const c10::IValue& value : values) {
        types.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    const auto metadata = torch::dynamo::autograd::IValuePacker<Metadata>::pack(
        torch::dynamo::autograd::get_input_metadata(next_edges()));
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function = compiler->bind_function(saved.get_py_compiler(), name(), run, types,
                                                         /*is_custom_function=*/true, /*is_traceable=*/true);
    variable_list gradients =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads, values, metadata);
    saved.after(saved_), saved.after(args_.max_seqlen_q), saved.after(args_.max_seqlen_k);
    return gradients;
}

}  // namespace flash_attn
