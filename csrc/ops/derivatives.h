// Errors for unsupported derivatives (second order, forward mode). They must raise: by default torch would treat the
// result as a constant and return wrong gradients.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <string>

namespace flash_attn {

inline constexpr char kUseFunctions[] =
    "the op alone has no backward; call flash_attn.flash_attn_func or flash_attn.flash_attn_varlen_func, which are "
    "differentiable once";
inline constexpr char kOnlyOnce[] =
    "gradients of gradients are not supported; where they are needed, use plain attention, such as "
    "torch.nn.functional.scaled_dot_product_attention with torch.nn.attention.SDPBackend.MATH";

inline void refuse_tangent(const std::string& op, const at::Tensor& t) {
    TORCH_CHECK(!t.defined() || !t._fw_grad(/*level=*/0).defined(), op,
                ": forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is not supported; use ",
                "reverse mode");
}

// A node in the smart pointer that torch::autograd::Edge holds, which differs between releases of torch.
template <class Node, class Edge = torch::autograd::Edge> auto node_pointer(Node* node) {
    using Pointer = decltype(Edge::function);
    if constexpr (requires { Pointer::unsafe_steal_from_new(node); }) {
        return Pointer::unsafe_steal_from_new(node);
    } else {
        return Pointer(node);
    }
}

inline void append_edge(torch::autograd::edge_list& edges, const at::Tensor& t) {
    if (t.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(t));
}

// An edge to a node that raises when backward reaches it.
inline torch::autograd::Edge raising_edge(const std::string& op, const char* reason, torch::autograd::edge_list inputs,
                                          const at::Tensor& result) {
    auto* const error = new torch::autograd::Error(op + ": " + reason, std::move(inputs));
    error->add_input_metadata(result);
    return {node_pointer(error), 0};
}

}  // namespace flash_attn
