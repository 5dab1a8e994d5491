// What the host computes before it launches the kernels for compute capability 9.0.
#pragma once
#include <bit>
#include "cuda/device.h"
#include "cuda/sm90/tma_strides.h"
#include "policy/host_device.h"
#include "policy/tile_order.h"

namespace flash_attn::cuda {

// Sizes of q, of k and of tensors with their rows, with the given number of columns.
inline TensorSize query_size(const Problem& p, int columns) {
    const bool packed = p.seqlens.cu_seqlens_q;
    return {packed ? 1 : p.batch_size, p.num_heads, packed ? p.seqlens.total_q : p.seqlens.seqlen_q, columns};
}
inline TensorSize key_size(const Problem& p, int columns) {
    const bool packed = p.seqlens.cu_seqlens_k;
    return {packed ? 1 : p.batch_size, p.num_heads_k, packed ? p.seqlens.total_k : p.seqlens.seqlen_k, columns};
}

inline const char* check_tiles(int64_t tiles) {
    return tiles > INT32_MAX ? "the problem has more than 2^31 - 1 tiles" : nullptr;
}

// Heads per group of TileOrder. Under a mask tiles differ in work, and the longest tiles of a group come first. A group
// has as many heads as share half of the L2 cache; if these are not all heads, a power of two, so that most batches
// have no smaller last group. Without a mask, one head at a time. key_head_bytes: data that the heads of one key head
// reread; heads_per_key_head: number of those heads in the grid.
inline int l2_head_group(const Problem& p, const TileGrid& grid, const Device& device, int64_t key_head_bytes,
                         int heads_per_key_head) {
    if (!masks_keys(p)) return 1;
    const int64_t all = max<int64_t>(int64_t(grid.num_heads) * grid.batch_size, 1);
    const auto key_heads = uint64_t(max<int64_t>(device.l2_bytes / 2 / max<int64_t>(key_head_bytes, 1), 1));
    if (int64_t(key_heads) * heads_per_key_head >= all) return int(all);
    return int(std::bit_floor(key_heads)) * heads_per_key_head;
}

// The workspace of the forward pass: the counter of taken tiles and, with a mask, one repeat entry per 64 queries of a
// head (FwdRepeats).
constexpr int kFwdCounterBytes = 16, kFwdRepeatBytes = 8, kFwdRepeatRows = 64;
inline int64_t fwd_repeat_places(const Problem& p) {
    return masks_keys(p) ? p.num_heads * num_query_tiles(p, kFwdRepeatRows) : 0;
}

}  // namespace flash_attn::cuda
