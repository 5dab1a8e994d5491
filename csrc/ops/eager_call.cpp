#include "ops/eager_call.h"
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <cmath>
#include "ops/attention.h"

namespace flash_attn {
namespace {

using Inputs = c10::SmallVector<Tensor, 3>;

// Reads arguments in order. Each method stores the next one and returns whether it has the expected plain type.
class Reader {
public:
    Reader(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {}

    bool is_at_end() const { return next_ == end_; }
    bool real(double& value) {
        PyObject* x = take();
        if (!x || !PyFloat_CheckExact(x)) return false;
        value = PyFloat_AS_DOUBLE(x);
        return true;
    }
    bool real(std::optional<double>& value) { return none() || real(value.emplace()); }
    bool boolean(bool& value) {
        PyObject* x = take();
        value = x == Py_True;
        return x && PyBool_Check(x);
    }
    bool integer(int64_t& value) {
        PyObject* x = take();
        if (!x || !PyLong_CheckExact(x)) return false;
        int overflow = 0;
        value = PyLong_AsLongLongAndOverflow(x, &overflow);
        return overflow == 0;
    }
    bool integer(c10::SymInt& value) {
        int64_t number = 0;
        if (!integer(number)) return false;
        value = number;
        return true;
    }
    // A tensor with storage, of a class without __torch_function__.
    bool tensor(Tensor& value) {
        PyObject* x = take();
        if (!x || !THPVariable_CheckExact(x)) return false;
        value = THPVariable_Unpack(x);
        return value.layout() == at::kStrided && !value.is_nested();
    }
    bool tensor(OptionalTensor& value) { return none() || tensor(value.emplace()); }
    // A reader of the elements of a tuple or of a subclass (namedtuple).
    std::optional<Reader> tuple() {
        PyObject* x = take();
        if (!x || !PyTuple_Check(x)) return std::nullopt;
        return Reader(reinterpret_cast<PyTupleObject*>(x)->ob_item, PyTuple_GET_SIZE(x));
    }
    // Consumes the next argument if it is None.
    bool none() {
        if (next_ == end_ || *next_ != Py_None) return false;
        ++next_;
        return true;
    }

private:
    PyObject* take() { return next_ == end_ ? nullptr : *next_++; }

    PyObject* const* next_;
    PyObject* const* end_;
};

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

bool read_window(Reader& reader, AttentionArgs& args) {
    std::optional<Reader> tuple = reader.tuple();
    return tuple && tuple->integer(args.window_size_left) && tuple->integer(args.window_size_right) &&
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
               reader.real(args.softmax_scale) && reader.boolean(args.causal) && read_window(reader, args) &&
               reader.integer(args.attention_chunk) && reader.real(args.softcap) && reader.tensor(args.alibi_slopes) &&
               reader.boolean(deterministic) && reader.boolean(return_attn_probs) && reader.is_at_end();
    }
    // Whether nothing is left for Python to check or convert.
    bool is_plain() const {
        const Tensor& first = inputs.front();
        if (at::impl::torch_function_mode_enabled() || !are_split(inputs, args.packed())) return false;
        if (head_dim() == 0 || (return_attn_probs && args.dropout_p > 0)) return false;
        if (args.alibi_slopes && at::GradMode::is_enabled() && args.alibi_slopes->requires_grad()) return false;
        return first.is_meta() || !at::autocast::is_autocast_enabled(first.device().type());
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
    const auto [out, softmax_lse, rng_state] = call.run();
    const auto wrap = [](const Tensor& t) {
        return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t));
    };
    if (!call.return_attn_probs) return wrap(out).release().ptr();
    const Tensor no_probs = at::empty({0}, out.options());
    return pybind11::make_tuple(wrap(out), wrap(softmax_lse), wrap(no_probs)).release().ptr();
    END_HANDLE_TH_ERRORS
}

}  // namespace flash_attn
