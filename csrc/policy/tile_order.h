// Which tile of which head and sequence a block works on.
#pragma once
#include "policy/divisor.h"
#include "policy/host_device.h"
#include "policy/mask.h"
#include "problem.h"

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

// The order in which tiles are begun. Heads, of all sequences, form sections, which follow one another: those at work
// at one time share what the section reads. Within a section the last tiles come first, those of all its heads: under a
// causal mask they have most to do, and what is begun last should be short.
struct TileOrder {
    TileGrid grid;
    int num_sections;
    Divisor section_tiles, section_heads, last_section_heads, num_heads;

    FA_HOST_DEVICE WorkTile at(int i) const {
        const int section = section_tiles.quotient(i), within = section_tiles.remainder(i);
        const Divisor heads = section + 1 < num_sections ? section_heads : last_section_heads;
        const int row = section * int(section_heads.divisor) + heads.remainder(within);
        return {grid.num_tiles - 1 - heads.quotient(within), num_heads.remainder(row), num_heads.quotient(row)};
    }
};

// section_heads: at least 1, at most all. No more than 2^31 - 1 tiles.
inline TileOrder make_tile_order(const TileGrid& grid, int section_heads) {
    const int heads = grid.num_heads * grid.batch_size, sections = ceil_div(heads, section_heads);
    return {grid,
            sections,
            make_divisor(max(grid.num_tiles, 1) * section_heads),
            make_divisor(section_heads),
            make_divisor(heads - (sections - 1) * section_heads),
            make_divisor(grid.num_heads)};
}

// Queries or keys as tiles of `size`, tile i being [size * i, size * (i + 1)). Where a mask leaves nothing, its ranges
// end at or before 0, and so do these.
FA_HOST_DEVICE Range tiles_of(Range rows, int size) { return {rows.begin / size, ceil_div(rows.end, size)}; }

// Tiles of block_m queries in a workspace: of all sequences, for one head. Sequences of packed tensors start at tile
// row / block_m + batch, which leaves room for the last, partial tile of each, whatever the lengths are.
FA_HOST_DEVICE int64_t num_query_tiles(const Problem& p, int block_m) {
    if (p.seqlens.cu_seqlens_q) return p.seqlens.total_q / block_m + p.batch_size + 1;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * p.batch_size;
}
FA_HOST_DEVICE int64_t first_query_tile(const Problem& p, int block_m, int batch, int64_t first_row_q) {
    if (p.seqlens.cu_seqlens_q) return first_row_q / block_m + batch;
    return int64_t(ceil_div(p.seqlens.seqlen_q, block_m)) * batch;
}

}  // namespace flash_attn
