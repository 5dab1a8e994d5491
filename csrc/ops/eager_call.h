// Fast paths from Python to the ops, a C function each, for arguments of the simplest types. They return None without
// side effects if an argument must first be checked, converted or rejected in Python.
#pragma once
#include <Python.h>

namespace flash_attn {

// Arguments: inputs, sequences (None or a flash_attn.autograd.Sequences), dropout_p, softmax_scale, causal,
// window_size, attention_chunk, softcap, alibi_slopes, s_aux, deterministic, return_attn_probs. Returns the result of
// the public functions.
PyObject* eager_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// Arguments and result: those of flash_attn_with_kvcache, in order.
PyObject* eager_kvcache_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace flash_attn
