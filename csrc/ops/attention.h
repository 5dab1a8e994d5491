// Differentiable attention: chooses the op of flash_attn 2.8.3 or our own op, depending on the arguments.
#pragma once
#include "ops/arguments.h"

namespace flash_attn {

// Results carry the autograd graph. inputs: (q, k, v), (q, kv) or (qkv). args.softmax_scale is required.
AttentionResult attention(at::TensorList inputs, const AttentionArgs& args, bool deterministic);

}  // namespace flash_attn
