// The workspace of the backward pass: the sums of dQ, then the turns.
#pragma once
#include <cstdint>
#include "attn/scheduler.h"

namespace flash_attn::cuda {

// Every kernel's tiles of queries are of this size or divide it, so that a workspace is large enough for any.
constexpr int kLargestBlockM = 64, kSmallestBlockM = 32;

inline int64_t dq_sums_bytes(const Problem& p, int block_m, int head_dim) {
    return int64_t(p.num_heads) * num_dq_tiles(p, block_m) * block_m * head_dim * int64_t(sizeof(float));
}

}  // namespace flash_attn::cuda
