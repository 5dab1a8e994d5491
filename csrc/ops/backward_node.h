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

private:
    // The call as it was, and what autograd asks of it.
    struct Call;
    FlashAttentionBackward(const AttentionArgs& args, BackwardOps ops, bool deterministic)
        : args_(args), ops_(ops), deterministic_(deterministic) {}
    void save(at::TensorList inputs, const Tensor& out, const Tensor& softmax_lse);
    Call unpack();

    std::vector<torch::autograd::SavedVariable> inputs_;
    torch::autograd::SavedVariable out_, softmax_lse_;
    AttentionArgs args_;                                        // without its tensors
    std::vector<torch::autograd::SavedVariable> args_tensors_;  // one for each field that may be a tensor
    BackwardOps ops_;
    bool deterministic_;
};

}  // namespace flash_attn
