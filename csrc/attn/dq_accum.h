// The workspace of the backward pass: dQ summed in fp32 by the blocks of all key tiles, and, for sums in a fixed order,
// one counter per tile of queries, which says whose turn it is.
//
// Tiles of kBlockM queries, [num_heads][num_tiles] of them, those of one sequence side by side. A tile holds its
// elements in the order in which the threads of a block have them in their accumulators, so that what a warp adds with
// one instruction is contiguous and nobody transposes.
#pragma once
#include "host_device.h"
#include "params.h"
#include "tile/acc_tile.h"

namespace flash_attn {

struct DqAccum {
    float* sums;     // [num_heads, num_tiles, kBlockM * head_dim of the kernel]
    int32_t* turns;  // [num_heads, num_tiles]
    int64_t num_tiles;
};

// Where the elements of one thread begin: element i of its accumulators is at [kThreads * i].
template <int kTileElements> FA_DEVICE float* dq_sums(const DqAccum& accum, int head, int64_t tile) {
    return accum.sums + (head * accum.num_tiles + tile) * kTileElements + ptx::thread_idx();
}
FA_DEVICE int32_t* dq_turn(const DqAccum& accum, int head, int64_t tile) {
    return accum.turns + head * accum.num_tiles + tile;
}

}  // namespace flash_attn
