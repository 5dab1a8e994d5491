// The workspace of the backward pass. Every block of a key tile adds its contribution to dQ in an fp32 accumulator; in
// a deterministic pass, semaphores per dQ tile make blocks add in a fixed order. For kernels that need it, the
// workspace also holds softmax_lse and dsoftmax_sum padded to whole tiles.
//
// The accumulator is [num_heads][num_tiles] tiles of kBlockM queries; a sequence's tiles are contiguous. Elements of a
// tile are in the order of the main kernel's accumulator registers, so that vector and bulk reductions are contiguous
// and nothing is transposed; the postprocess kernel reads them in the same order.
#pragma once
#include "cuda/ptx/types.h"
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

struct DqAccum {
    float* sums;     // [num_heads, num_tiles, kDqTileElements]
    int32_t* turns;  // semaphores, [num_heads, num_tiles, kDqTurns]: number of blocks that have added
    int64_t num_tiles;
    // [num_heads, num_tiles, kBlockM], or null: softmax_lse * log2(e), and dsoftmax_sum. Rows past the last query and
    // queries without visible keys have +infinity and 0, so that their P and dS are 0.
    float* lse_log2;
    float* dsoftmax_sum;
};

// tile: index over all sequences.
template <class Config> FA_DEVICE float* dq_sums(const DqAccum& accum, int head, int64_t tile) {
    return accum.sums + (head * accum.num_tiles + tile) * Config::kDqTileElements;
}
template <class Config> FA_DEVICE int32_t* dq_turns(const DqAccum& accum, int head, int64_t tile) {
    return accum.turns + (head * accum.num_tiles + tile) * Config::kDqTurns;
}
// Offset of a tile's entries in lse_log2 and dsoftmax_sum.
template <class Config> FA_DEVICE int64_t dq_rows(const DqAccum& accum, int head, int64_t tile) {
    return (head * accum.num_tiles + tile) * Config::kBlockM;
}

}  // namespace flash_attn
