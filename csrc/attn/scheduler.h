// Which tile of which head and sequence a block works on.
#pragma once
#include "attn/mask.h"
#include "host_device.h"
#include "params.h"

namespace flash_attn {

struct WorkTile { int tile, head, batch; };

// Blocks count tiles first, then heads, then sequences: those at work at one time share the keys and values of a head.
struct TileGrid {
    int num_tiles, num_heads, batch_size;

    FA_HOST_DEVICE int64_t num_blocks() const { return int64_t(num_tiles) * num_heads * batch_size; }
    FA_HOST_DEVICE WorkTile at(int block) const {
        const int row = block / num_tiles;
        return {block % num_tiles, row % num_heads, row / num_heads};
    }
};

// Tiles of queries, in every sequence as many as the longest may have; those past the end have nothing to do.
FA_HOST_DEVICE TileGrid query_grid(const Problem& p, int block_m) {
    return {ceil_div(p.seqlens.seqlen_q, block_m), p.num_heads, p.batch_size};
}
FA_HOST_DEVICE TileGrid key_grid(const Problem& p, int block_n) {
    return {ceil_div(p.seqlens.seqlen_k, block_n), p.num_heads_k, p.batch_size};
}

// Queries or keys as tiles of `size`, tile i being [size * i, size * (i + 1)). Where a mask leaves nothing, its ranges
// end at or before 0, and so do these.
FA_HOST_DEVICE Range tiles_of(Range rows, int size) { return {rows.begin / size, ceil_div(rows.end, size)}; }

// Tiles of block_m queries in the workspace of dQ: of all sequences, for one head. Sequences of packed tensors start at
// tile row / kBlockM + batch, which leaves room for the last, partial tile of each, whatever the lengths are.
FA_HOST_DEVICE int64_t num_dq_tiles(const Problem& p, int block_m) {
    if (p.seqlens.cu_seqlens_q) return p.seqlens.total_q / block_m + p.batch_size + 1;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * p.batch_size;
}
FA_HOST_DEVICE int64_t first_dq_tile(const Problem& p, int block_m, int batch, int64_t first_row_q) {
    if (p.seqlens.cu_seqlens_q) return first_row_q / block_m + batch;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * batch;
}

}  // namespace flash_attn
