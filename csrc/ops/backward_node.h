// The node of autograd's graph behind the forward ops: it keeps inputs and results, and no matrix of weights, and calls
// a backward op, which recomputes the weights from softmax_lse (FlashAttention-2, section 3.1.2).
#pragma once
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <array>
#include <vector>
#include "ops/arguments.h"

namespace flash_attn {

// q, k and v of the inputs of a call: these three; q and kv, [..., 2, num_heads_k, head_dim]; or qkv alone.
std::array<Tensor, 3> split_inputs(at::TensorList inputs);

// Which backward ops a node calls. Those of flash_attn 2.8.3 belong to the forward ops of that version, as far as they
// have what is needed.
enum class BackwardOps { kOriginal, kOurs };

class FlashAttentionBackward final : public torch::autograd::Node {
public:
    // Makes out and softmax_lse results of the inputs.
    static void record(at::TensorList inputs, const AttentionArgs& args, const Tensor& out, const Tensor& softmax_lse,
                       BackwardOps ops, bool deterministic);

    torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
    void release_variables() override;
    std::string name() const override { return "FlashAttentionBackward"; }
    // For compiled autograd: all that apply depends on, and apply with other tensors in place of the saved ones.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
    torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                    torch::dynamo::autograd::SwapSavedVariables& saved) override;

private:
    FlashAttentionBackward(size_t num_inputs, const AttentionArgs& args, BackwardOps ops, bool deterministic)
        : num_inputs_(num_inputs), args_(args), ops_(ops), deterministic_(deterministic) {}
    void save(const Tensor& tensor, bool is_output) { saved_.emplace_back(tensor, is_output); }
    torch::autograd::variable_list unpack();
    bool is_deterministic() const;
    std::vector<bool> needed() const;  // of the inputs, which want their gradient

    size_t num_inputs_;
    AttentionArgs args_;                                 // without its tensors
    std::vector<torch::autograd::SavedVariable> saved_;  // inputs, out, softmax_lse, and the tensors of the arguments
    BackwardOps ops_;
    bool deterministic_;
};

}  // namespace flash_attn
