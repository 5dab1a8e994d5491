// Whether tensors share memory, for kernels that write one while they read another.
#pragma once
#include <ATen/core/Tensor.h>

namespace flash_attn {

// Whether an element of one is in the memory of the other. Exact for views that are slices of one tensor or transposed
// alike; where the strides make the search long, false.
bool share_memory(const at::Tensor& a, const at::Tensor& b);
// The same for different elements of one tensor.
bool overlaps_itself(const at::Tensor& t);

}  // namespace flash_attn
