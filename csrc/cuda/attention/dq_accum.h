// The workspace of the backward pass: dQ, summed in fp32 by the blocks of all key tiles, and, for sums in a fixed
// order, counters that say whose turn it is; where kernels ask for it, two numbers per query as well.
//
// Tiles of kBlockM queries, [num_heads][num_tiles] of them, those of one sequence side by side. A tile holds its
// elements in the order in which the threads of a block have them in their accumulators, so that what is added with one
// instruction is contiguous and nobody transposes.
#pragma once
#include "cuda/ptx/types.h"
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

struct DqAccum {
    float* sums;     // [num_heads, num_tiles, elements of a tile]
    int32_t* turns;  // [num_heads, num_tiles, turns of a tile]
    int64_t num_tiles;
    // [num_heads, num_tiles, kBlockM], or null: softmax_lse in the log2 domain, and dsoftmax_sum. Of what is no query,
    // or sees no key, +infinity and 0, with which its weights and gradients become 0.
    float* lse_log2;
    float* dsoftmax_sum;
};

// tile: of all sequences.
template <class Config> FA_DEVICE float* dq_sums(const DqAccum& accum, int head, int64_t tile) {
    return accum.sums + (head * accum.num_tiles + tile) * Config::kDqTileElements;
}
template <class Config> FA_DEVICE int32_t* dq_turns(const DqAccum& accum, int head, int64_t tile) {
    return accum.turns + (head * accum.num_tiles + tile) * Config::kDqTurns;
}
// Where the numbers of a tile's queries start.
template <class Config> FA_DEVICE int64_t dq_rows(const DqAccum& accum, int head, int64_t tile) {
    return (head * accum.num_tiles + tile) * Config::kBlockM;
}

}  // namespace flash_attn
