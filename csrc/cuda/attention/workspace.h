// Layout of the backward workspace (cuda/attention/dq_accum.h), a single allocation.
#pragma once
#include <cstdint>
#include "policy/tile_order.h"

namespace flash_attn::cuda {

struct WorkspaceShape {
    int block_m, tile_elements, turns;  // of a dQ tile; turns: number of semaphores
    bool pads_rows;
};

// Byte offsets of its parts.
struct WorkspaceOffsets {
    static constexpr int64_t kNumberBytes = 4, kAlignment = 16;
    int64_t tiles, turns, lse_log2, dsoftmax_sum, end;

    WorkspaceOffsets(const Problem& p, const WorkspaceShape& shape)
        : tiles(num_query_tiles(p, shape.block_m) * p.num_heads), turns(tiles * shape.tile_elements * kNumberBytes),
          lse_log2(turns + round_up(tiles * shape.turns * kNumberBytes, kAlignment)),
          dsoftmax_sum(lse_log2 + rows_bytes(shape)), end(dsoftmax_sum + rows_bytes(shape)) {}

private:
    int64_t rows_bytes(const WorkspaceShape& shape) const {
        return shape.pads_rows ? tiles * shape.block_m * kNumberBytes : 0;
    }
};

}  // namespace flash_attn::cuda
