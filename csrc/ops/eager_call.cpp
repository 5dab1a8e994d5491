#include "ops/eager_call.h"
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <cmath>
#include "ops/attention.h"
#include "ops/reader.h"

namespace flash_attn {
namespace {

using Inputs = c10::SmallVector<Tensor, 3>;

bool read_inputs(Reader& reader, Inputs& inputs) {
    std::optional<Reader> tuple = reader.tuple();
    while (tuple && !tuple->is_at_end()) {
        if (!tuple->tensor(inputs.emplace_back())) return false;
    }
    return tuple && !inputs.empty() && inputs.size() <= 3;
}

// A Sequences tuple without paged KV; calls with a block table take the Python path.
bool read_sequences(Reader& reader, AttentionArgs& args) {
    if (reader.none()) return true;
    std::optional<Reader> tuple = reader.tuple();
    return tuple && tuple->tensor(args.cu_seqlens_q.emplace()) && tuple->tensor(args.cu_seqlens_k.emplace()) &&
           tuple->integer(args.max_seqlen_q) && tuple->integer(args.max_seqlen_k) && tuple->none() && tuple->none() &&
           tuple->is_at_end();
}

// Whether the shapes of (q, kv) or (qkv) allow splitting.
bool are_split(const Inputs& inputs, bool packed) {
    if (inputs.size() == 3) return true;
    const Tensor& last = inputs.back();
    return last.dim() == (packed ? 4 : 5) && last.sym_size(-3) == (inputs.size() == 2 ? 2 : 3);
}

struct EagerCall {
    Inputs inputs;
    AttentionArgs args;
    bool deterministic = false, return_attn_probs = false;

    bool read(Reader reader) {
        return read_inputs(reader, inputs) && read_sequences(reader, args) && reader.real(args.dropout_p) &&
               reader.real(args.softmax_scale) && reader.boolean(args.causal) &&
               reader.window(args.window_size_left, args.window_size_right) && reader.integer(args.attention_chunk) &&
               reader.real(args.softcap) && reader.tensor(args.alibi_slopes) && reader.tensor(args.s_aux) &&
               reader.boolean(deterministic) && reader.boolean(return_attn_probs) && reader.is_at_end();
    }
    // Whether nothing is left for Python to check or convert.
    bool is_plain() const {
        if (!are_split(inputs, args.packed())) return false;
        if (head_dim() == 0 || (return_attn_probs && args.dropout_p > 0)) return false;
        if (args.alibi_slopes && at::GradMode::is_enabled() && args.alibi_slopes->requires_grad()) return false;
        return !is_intercepted(inputs.front());
    }
    AttentionResult run() {
        const pybind11::gil_scoped_release no_gil;
        if (!args.softmax_scale) args.softmax_scale = std::pow(double(head_dim()), -0.5);
        return attention(inputs, args, deterministic);
    }

private:
    int64_t head_dim() const {
        const Tensor& first = inputs.front();
        return first.dim() > 0 ? first.sym_size(-1).guard_int(__FILE__, __LINE__) : 0;
    }
};

}  // namespace

PyObject* eager_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    EagerCall call;
    if (!call.read({arguments, count}) || !call.is_plain()) Py_RETURN_NONE;
    const auto [out, softmax_lse, max_logits, rng_state] = call.run();
    if (!call.return_attn_probs) return as_python(out).release().ptr();
    const Tensor no_probs = at::empty({0}, out.options());
    return pybind11::make_tuple(as_python(out), as_python(softmax_lse), as_python(no_probs)).release().ptr();
    END_HANDLE_TH_ERRORS
}

}  // namespace flash_attn
