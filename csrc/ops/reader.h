// What fast paths from Python share: a reader of plain arguments, and results as Python objects.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include "ops/arguments.h"

namespace flash_attn {

// Reads arguments in order. Each method stores the next one and returns whether it has the expected plain type.
class Reader {
public:
    Reader(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {}

    bool is_at_end() const { return next_ == end_; }
    // Whether the next argument is an int.
    bool is_integer() const { return next_ != end_ && PyLong_CheckExact(*next_); }
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
    bool window(int64_t& left, int64_t& right) {
        std::optional<Reader> pair = tuple();
        return pair && pair->integer(left) && pair->integer(right) && pair->is_at_end();
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

// Whether the call must go through Python: a torch function mode sees it, or autocast casts tensors of this device.
inline bool is_intercepted(const Tensor& tensor) {
    if (at::impl::torch_function_mode_enabled()) return true;
    return !tensor.is_meta() && at::autocast::is_autocast_enabled(tensor.device().type());
}

inline pybind11::object as_python(const Tensor& tensor) {
    return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(tensor));
}

}  // namespace flash_attn
