// The workspace of the backward pass. Every block of a key tile adds its share of dQ to an accumulator in fp32; in a
// deterministic pass a semaphore per tile of dQ makes blocks add in a fixed order. Kernels that ask for it also find
// softmax_lse and dsoftmax_sum padded to whole tiles there.
//
// The accumulator is [num_heads][num_tiles] tiles of kBlockM queries, those of one sequence side by side. Within a tile
// elements are in the order of the accumulator registers of the main kernel's threads, so that a vector or bulk
// reduction is contiguous and nothing is transposed; the postprocess kernel reads them by the same order.
#pragma once
#include "cuda/ptx/types.h"
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

struct DqAccum {
    float* sums;     // [num_heads, num_tiles, kDqTileElements]
    int32_t* turns;  // semaphores: [num_heads, num_tiles, kDqTurns], the number of blocks that have added
    int64_t num_tiles;
    // [num_heads, num_tiles, kBlockM], or null: softmax_lse * log2(e), and dsoftmax_sum. Rows past the last query, and
    // queries that see no key, have +infinity and 0, which make their P and dS 0.
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
