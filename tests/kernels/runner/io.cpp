#include "runner/io.h"
#include <algorithm>
#include "cuda/instances.h"
#include "cuda/sm80/config.h"
#include "cuda/sm90/config.h"
#include "policy/host_device.h"

namespace flash_attn::runner {
namespace {

constexpr int64_t kElementBytes = 2, kFloatBytes = 4;

struct TileShape {
    int rows, keys;
    int head_dim;  // of the kernel: what is asked for, rounded up
};

int64_t result_bytes(const Case& c) { return c.float_results ? kFloatBytes : kElementBytes; }

bool modifies_scores(const Case& c) {
    return c.softcap > 0 || !c.alibi.empty() || c.dropout_p > 0 || !c.key_ranges.empty();
}
bool has_large_smem(const Case& c) { return c.smem >= kLargeSmemBytes; }

// Of the largest kernels, for a case that none runs.
template <size_t kCount> int kernel_head_dim(const Problem& p, const int (&head_dims)[kCount]) {
    const int found = cuda::instance_head_dim(p, head_dims);
    return found ? found : head_dims[kCount - 1];
}

template <class Shape> TileShape tiles_of(const Shape& shape) { return {shape.block_m, shape.block_n, shape.head_dim}; }

TileShape fwd_tiles(const Inputs& x, bool hopper) {
    const Problem p = x.problem();
    if (!hopper) return tiles_of(fwd_shape_sm80(kernel_head_dim(p, kHeadDimsSm80), has_large_smem(x.c)));
    const int head_dim = kernel_head_dim(p, kHeadDimsSm90);
    const int head_dim_v = fwd_head_dim_v_sm90(head_dim, p.head_dim_v);
    return tiles_of(fwd_shape_sm90(head_dim, head_dim_v, modifies_scores(x.c),
                                   !modifies_scores(x.c) && prefers_short(p, head_dim, head_dim_v)));
}

// Keys from the first to the last that is in the range of any query of the blocks of 64 that have rows of a tile.
KeyRange keys_in_ranges(const Case& c, const Sequence& s, const TileShape& t, int row0) {
    constexpr int kBlock = 64;
    KeyRange all{s.seqlen_k, 0};
    for (int i = row0 / kBlock * kBlock; i < std::min(ceil_div(row0 + t.rows, kBlock) * kBlock, s.seqlen_q); ++i) {
        const KeyRange range = key_range(c, s, i);
        const int begin = std::max(range.begin, 0), end = std::min(range.end, s.seqlen_k);
        if (begin < end) all = {std::min(all.begin, begin), std::max(all.end, end)};
    }
    return all;
}

// Whether any query of a tile sees any key of a tile: other pairs of tiles are passed over. Of ranges, only what
// keys_in_ranges() says is known; the backward pass asks it and the window for tiles, not keys.
enum class Pass { kForward, kBackward };
bool seen(const Case& c, const Sequence& s, const TileShape& t, int row0, int key0, Pass pass = Pass::kForward) {
    KeyRange known = keys_in_ranges(c, s, t, row0);
    if (known.begin >= key0 + t.keys || known.end <= key0) return false;
    if (pass == Pass::kBackward) known = {0, s.seqlen_k};
    const int begin = std::max(key0, known.begin), end = std::min(key0 + t.keys, known.end);
    for (int i = row0; i < std::min(row0 + t.rows, s.seqlen_q); ++i)
        for (int j = begin; j < end; ++j)
            if (visible_in_window(c, s, i, j)) return true;
    return false;
}

// The tables that sum up key ranges: 16 bytes per 64 queries of the longest sequence and, in the backward pass, 8 bytes
// per 64 keys.
int64_t range_table_bytes(const Case& c, bool of_keys) {
    if (c.key_ranges.empty()) return 0;
    return c.batch_size() * int64_t(ceil_div(c.seqlen_q(), 64) * 16 + (of_keys ? ceil_div(c.seqlen_k(), 64) * 8 : 0));
}

// f(number of queries or keys in the tile, first of them) for every tile of a sequence.
template <class F> void for_each_tile(int length, int size, F f) {
    for (int first = 0; first < length; first += size) f(int64_t(std::min(size, length - first)), first);
}

}  // namespace

Traffic forward_traffic(const Inputs& x, bool hopper) {
    const Case& c = x.c;
    const TileShape t = fwd_tiles(x, hopper);
    Traffic bytes;
    bytes.written += range_table_bytes(c, false);
    for (const Sequence& s : sequences(c))
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
            int64_t keys = 0;
            for_each_tile(s.seqlen_k, t.keys, [&](int64_t count, int key0) {
                if (seen(c, s, t, row0, key0)) keys += count;
            });
            // Each tile of queries reads itself once, unless it sees nothing, and all keys and values of the tiles of
            // keys that it sees.
            if (keys) bytes.read += c.num_heads * rows * c.head_dim * kElementBytes;
            bytes.read += c.num_heads * keys * (c.head_dim + c.head_dim_v) * kElementBytes;
            bytes.written += c.num_heads * rows * (c.head_dim_v * result_bytes(c) + kFloatBytes);  // out, softmax_lse
        });
    return bytes;
}

Traffic backward_traffic(const Inputs& x, bool hopper) {
    const Case& c = x.c;
    const Problem p = x.problem();
    const auto shape80 = bwd_shape_sm80(kernel_head_dim(p, kHeadDimsSm80), has_large_smem(c), modifies_scores(c));
    const auto shape90 = bwd_shape_sm90(kernel_head_dim(p, kHeadDimsSm90), modifies_scores(c));
    const TileShape t = hopper ? tiles_of(shape90) : tiles_of(shape80);
    const cuda::WorkspaceShape workspace = hopper ? workspace_shape(shape90) : workspace_shape(shape80);
    // A tile of dQ, and counters of turns; where the main kernel wants them, two numbers per query are written once
    // more, for whole tiles, which it then reads.
    const int64_t dims = c.head_dim + c.head_dim_v, dq_tile_bytes = workspace.tile_elements * kFloatBytes;
    const int64_t turns = workspace.turns, padded_bytes = workspace.pads_rows ? 2 * t.rows * kFloatBytes : 0;
    Traffic bytes;
    bytes.written += range_table_bytes(c, true);
    for (const Sequence& s : sequences(c)) {
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int) {
            // Before: out, dout, softmax_lse and dlse give dsoftmax_sum; the tile of dQ and its counters are cleared.
            bytes.read += c.num_heads * rows * (2 * c.head_dim_v * kElementBytes + kFloatBytes);
            bytes.read += c.lse_grad ? c.num_heads * rows * kFloatBytes : 0;
            bytes.written += c.num_heads * (rows * kFloatBytes + dq_tile_bytes + turns * kFloatBytes + padded_bytes);
            // After: dQ.
            bytes.read += c.num_heads * dq_tile_bytes;
            bytes.written += c.num_heads * rows * c.head_dim * result_bytes(c);
        });
        for_each_tile(s.seqlen_k, t.keys, [&](int64_t keys, int key0) {
            int64_t rows_seen = 0, tiles_seen = 0;
            for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
                if (seen(c, s, t, row0, key0, Pass::kBackward)) rows_seen += rows, ++tiles_seen;
            });
            // A tile of keys is read once per head of keys, unless nothing sees it; q, dout, softmax_lse and
            // dsoftmax_sum once per head of queries and tile of keys that they see.
            if (tiles_seen) bytes.read += c.num_heads_k * keys * dims * kElementBytes;
            bytes.read += c.num_heads * rows_seen * dims * kElementBytes;
            bytes.read += c.num_heads * (hopper ? tiles_seen * padded_bytes : rows_seen * 2 * kFloatBytes);
            bytes.added += c.num_heads * tiles_seen * t.rows * t.head_dim * kFloatBytes;
            bytes.written += c.num_heads_k * keys * dims * result_bytes(c);  // dK and dV
        });
    }
    return bytes;
}

Traffic probs_traffic(const Inputs& x) {
    const Case& c = x.c;
    const TileShape t = tiles_of(fwd_shape_sm80(kernel_head_dim(x.problem(), kHeadDimsSm80), false));
    Traffic bytes;
    bytes.written += range_table_bytes(c, false);
    for (const Sequence& s : sequences(c))
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
            int64_t keys = 0;
            for_each_tile(s.seqlen_k, t.keys, [&](int64_t count, int key0) {
                if (seen(c, s, t, row0, key0)) keys += count;
            });
            // Each of the four lanes that share a row reads its softmax_lse.
            bytes.read += c.num_heads * rows * 4 * kFloatBytes;
            bytes.read += c.num_heads * ((keys ? rows : 0) + keys) * c.head_dim * kElementBytes;
            bytes.written += c.num_heads * rows * keys * kElementBytes;
        });
    return bytes;
}

}  // namespace flash_attn::runner
