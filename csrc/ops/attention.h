// Attention by whichever op has what a call needs.
#pragma once
#include "ops/arguments.h"

namespace flash_attn {

// Under autograd: a result of the inputs, (q, k, v), (q, kv) or (qkv). softmax_scale is given.
AttentionResult attention(at::TensorList inputs, const AttentionArgs& args, bool deterministic);

}  // namespace flash_attn
