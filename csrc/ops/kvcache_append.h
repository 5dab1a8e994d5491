// Appending to a KV cache with torch operations, on any device: slower than a kernel of its own.
#pragma once
#include "ops/kvcache.h"

namespace flash_attn {

// Writes k, rotated, and v into the caches of validated arguments, and returns q, rotated. A row that cannot be written
// (a negative length, past the capacity, on a page outside the pool) is left out. Device memory is not read by the
// host, so that the call can be captured in a CUDA graph.
Tensor append_with_torch(const KvCacheArgs& args);

}  // namespace flash_attn
