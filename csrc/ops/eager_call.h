// Attention called from Python at the cost of one C function, where every argument is of the plainest kind.
#pragma once
#include <Python.h>

namespace flash_attn {

// Takes inputs, sequences (None or a flash_attn.autograd.Sequences), dropout_p, softmax_scale, causal, window_size,
// softcap, alibi_slopes, deterministic and return_attn_probs. Returns what the public functions do; or None, having
// done nothing, for arguments that are to be checked, converted or refused first.
PyObject* eager_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace flash_attn
