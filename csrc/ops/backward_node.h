// The autograd node of the forward ops. It saves inputs and results, but no attention matrix, and calls a backward op,
// which recomputes the weights from softmax_lse (FlashAttention-2, section 3.1.2).
#pragma once
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <array>
#include <vector>
#include "ops/arguments.h"

namespace flash_attn {

// q, k and v as views of the inputs: (q, k, v); (q, kv) with kv [..., 2, num_heads_k, head_dim]; or (qkv).
std::array<Tensor, 3> split_inputs(at::TensorList inputs);

// Which backward ops the node calls. Forward ops of flash_attn 2.8.3 use the backward ops of that version if those have
// the arguments that are needed.
enum class BackwardOps { kOriginal, kOurs };

class FlashAttentionBackward final : public torch::autograd::Node {
public:
    // Makes out and softmax_lse outputs of a new node with edges to the inputs and args.s_aux.
    static void record(at::TensorList inputs, const AttentionArgs& args, const Tensor& out, const Tensor& softmax_lse,
                       BackwardOps ops, bool deterministic);

    torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
    void release_variables() override;
    std::string name() const override { return "FlashAttentionBackward"; }
    // For compiled autograd: the values that apply depends on, and apply with the saved tensors replaced.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
    torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                    torch::dynamo::autograd::SwapSavedVariables& saved) override;

private:
    FlashAttentionBackward(size_t num_inputs, const AttentionArgs& args, BackwardOps ops, bool deterministic)
        : num_inputs_(num_inputs), args_(args), ops_(ops), deterministic_(deterministic) {}
    void save(const Tensor& tensor, bool is_output) { saved_.emplace_back(tensor, is_output); }
    torch::autograd::variable_list unpack();
    bool is_deterministic() const;
    std::vector<bool> needed() const;  // of each input, and of s_aux if given: whether its gradient is needed

    size_t num_inputs_;
    AttentionArgs args_;                                 // without tensors
    std::vector<torch::autograd::SavedVariable> saved_;  // inputs, out, softmax_lse, and the tensors of args_
    BackwardOps ops_;
    bool deterministic_;
};

}  // namespace flash_attn
