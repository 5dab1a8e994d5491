// Tile scheduling: which tile of which head and sequence a thread block processes, and in which order.
#pragma once
#include "policy/divisor.h"
#include "policy/host_device.h"
#include "policy/mask.h"
#include "problem.h"

namespace flash_attn {

struct WorkTile { int tile, head, batch; };

// Block index = (batch * num_heads + head) * num_tiles + tile: concurrent blocks share the K and V of a head.
struct TileGrid {
    int num_tiles, num_heads, batch_size;

    FA_HOST_DEVICE int64_t num_blocks() const { return int64_t(num_tiles) * num_heads * batch_size; }
    FA_HOST_DEVICE WorkTile at(int block) const {
        const int row = block / num_tiles;
        return {block % num_tiles, row % num_heads, row / num_heads};
    }
};

// Query tiles; every sequence gets as many as the longest one may need, and tiles past its end exit at once.
FA_HOST_DEVICE TileGrid query_grid(const Problem& p, int block_m) {
    return {ceil_div(p.seqlens.seqlen_q, block_m), p.num_heads, p.batch_size};
}
FA_HOST_DEVICE TileGrid key_grid(const Problem& p, int block_n) {
    return {ceil_div(p.seqlens.seqlen_k, block_n), p.num_heads_k, p.batch_size};
}

// The order in which tiles are started. The heads of all sequences are split into groups whose operands fit the L2
// cache together; groups run one after another. Within a group the longest tiles come first: under a causal mask, the
// last tiles of all its heads (longest-processing-time-first scheduling).
struct TileOrder {
    TileGrid grid;
    int num_groups;
    Divisor group_tiles, group_heads, last_group_heads, num_heads;

    FA_HOST_DEVICE WorkTile at(int i) const {
        const int group = group_tiles.quotient(i), within = group_tiles.remainder(i);
        const Divisor heads = group + 1 < num_groups ? group_heads : last_group_heads;
        const int row = group * int(group_heads.divisor) + heads.remainder(within);
        return {grid.num_tiles - 1 - heads.quotient(within), num_heads.remainder(row), num_heads.quotient(row)};
    }
};

// l2_head_group: heads per group, between 1 and the number of heads. At most 2^31 - 1 tiles.
inline TileOrder make_tile_order(const TileGrid& grid, int l2_head_group) {
    const int heads = grid.num_heads * grid.batch_size, groups = ceil_div(heads, l2_head_group);
    return {grid,
            groups,
            make_divisor(max(grid.num_tiles, 1) * l2_head_group),
            make_divisor(l2_head_group),
            make_divisor(heads - (groups - 1) * l2_head_group),
            make_divisor(grid.num_heads)};
}

// Number of query tiles of one head in a workspace, over all sequences. Packed sequences start at tile row / block_m +
// batch, which leaves room for the partial last tile of each, whatever the lengths are.
FA_HOST_DEVICE int64_t num_query_tiles(const Problem& p, int block_m) {
    if (p.seqlens.cu_seqlens_q) return p.seqlens.total_q / block_m + p.batch_size + 1;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * p.batch_size;
}
FA_HOST_DEVICE int64_t first_query_tile(const Problem& p, int block_m, int batch, int64_t first_row_q) {
    if (p.seqlens.cu_seqlens_q) return first_row_q / block_m + batch;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * batch;
}

}  // namespace flash_attn
