// Fast path from Python to attention, a single C function, for arguments of the simplest types.
#pragma once
#include <Python.h>

namespace flash_attn {

// Arguments: inputs, sequences (None or a flash_attn.autograd.Sequences), dropout_p, softmax_scale, causal,
// window_size, softcap, alibi_slopes, deterministic, return_attn_probs. Returns the result of the public functions, or
// None without side effects if an argument must first be checked, converted or rejected in Python.
PyObject* eager_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace flash_attn
