// Tile shapes for compute capability 9.0. Plain data, also read by the host: it allocates the workspace before any
// kernel runs.
//
// The last row that fits a head_dim is used. Rows with plain_scores have no registers left for softcap, ALiBi and
// dropout; rows with long_sequences are slower where prefers_short() is true.
#pragma once
#include "cuda/attention/workspace.h"
#include "cuda/shape_table.h"
#include "policy/mask.h"
#include "policy/tile_order.h"

namespace flash_attn {

constexpr int kHeadDimsSm90[] = {
#include "cuda/sm90/head_dims.inl"
};

constexpr int kSm90SmemBytes = 227 * 1024;  // shared memory limit of a block

struct FwdShapeSm90 {
    int head_dim, head_dim_v, block_m, block_n, stages;
    bool plain_scores = false, long_sequences = false;

    bool operator==(const FwdShapeSm90&) const = default;
};
// clang-format off
constexpr FwdShapeSm90 kFwdShapesSm90[] = {
    {.head_dim = 64, .head_dim_v = 64, .block_m = 128, .block_n = 128, .stages = 4},
    {.head_dim = 64, .head_dim_v = 64, .block_m = 192, .block_n = 128, .stages = 4,
     .plain_scores = true, .long_sequences = true},
    {.head_dim = 96, .head_dim_v = 96, .block_m = 128, .block_n = 128, .stages = 2},
    {.head_dim = 128, .head_dim_v = 128, .block_m = 128, .block_n = 128, .stages = 2},
    {.head_dim = 192, .head_dim_v = 128, .block_m = 128, .block_n = 128, .stages = 2},
    {.head_dim = 192, .head_dim_v = 192, .block_m = 128, .block_n = 96, .stages = 2},
    {.head_dim = 192, .head_dim_v = 192, .block_m = 128, .block_n = 112, .stages = 2, .plain_scores = true},
    {.head_dim = 256, .head_dim_v = 256, .block_m = 128, .block_n = 64, .stages = 2},
    {.head_dim = 256, .head_dim_v = 256, .block_m = 128, .block_n = 80, .stages = 2, .plain_scores = true},
};
// clang-format on

constexpr FwdShapeSm90 fwd_shape_sm90(int head_dim, int head_dim_v, bool modifies_scores, bool is_short) {
    return last_row(kFwdShapesSm90, [&](const FwdShapeSm90& row) {
        return row.head_dim == head_dim && row.head_dim_v == head_dim_v && !(row.plain_scores && modifies_scores) &&
               !(row.long_sequences && is_short);
    });
}
// The smallest head_dim_v >= needed that is compiled for a head_dim; head_dim if there is none.
constexpr int fwd_head_dim_v_sm90(int head_dim, int needed) {
    int least = head_dim;
    for (const FwdShapeSm90& row : kFwdShapesSm90)
        if (row.head_dim == head_dim && row.head_dim_v >= needed) least = min(least, row.head_dim_v);
    return least;
}

// Time in microseconds on an H200 (benchmarks/results/nvidia-h200, experiment 12): per query tile of head_dim 64, plus
// per key tile that it sees.
inline double estimated_time(const Problem& p, const FwdShapeSm90& shape) {
    const bool is_large = shape.block_m == 192;
    const double tile_time = is_large ? 1.96 : 1.74, keys_time = is_large ? 1.51 : 1.15;
    Positions positions = p.positions;
    positions.given &= !positions.q_starts && !positions.k_starts;  // those are in device memory
    const Sequence longest{0, 0, p.seqlens.seqlen_q, p.seqlens.seqlen_k, 0, 0, 0};
    const auto mask = WindowMask::of(p, placed(longest, positions, 0), 0, 0);
    double time = 0;
    for (int m0 = 0; m0 < p.seqlens.seqlen_q; m0 += shape.block_m) {
        const Range tiles = tiles_of(mask.kv_range({m0, m0 + shape.block_m}), shape.block_n);
        time += tile_time + keys_time * max(tiles.end - tiles.begin, 0);
    }
    return time;
}

// Whether smaller query tiles are faster. Long sequences are always faster with the larger ones.
inline bool prefers_short(const Problem& p, int head_dim, int head_dim_v) {
    constexpr int kLongestShort = 2048;
    const FwdShapeSm90 brief = fwd_shape_sm90(head_dim, head_dim_v, false, true);
    const FwdShapeSm90 plain = fwd_shape_sm90(head_dim, head_dim_v, false, false);
    if (brief == plain || p.seqlens.seqlen_q > kLongestShort) return false;
    return estimated_time(p, brief) < estimated_time(p, plain);
}

// Consumers own rows of dK and dV (64 keys each) or, where those do not fit into registers, an equal share of the
// columns for all keys.
struct BwdShapeSm90 {
    int head_dim, block_m, block_n, consumers;
    bool plain_scores = false;

    constexpr bool owns_columns() const { return head_dim > 128; }
};
constexpr BwdShapeSm90 kBwdShapesSm90[] = {
    {.head_dim = 64, .block_m = 64, .block_n = 128, .consumers = 2},
    {.head_dim = 64, .block_m = 128, .block_n = 128, .consumers = 2, .plain_scores = true},
    {.head_dim = 96, .block_m = 64, .block_n = 128, .consumers = 2},
    {.head_dim = 128, .block_m = 64, .block_n = 128, .consumers = 2},
    {.head_dim = 192, .block_m = 64, .block_n = 96, .consumers = 3},
    {.head_dim = 256, .block_m = 64, .block_n = 64, .consumers = 2},  // dropout needs a multiple of 32 keys
    {.head_dim = 256, .block_m = 64, .block_n = 80, .consumers = 2, .plain_scores = true},
};

constexpr BwdShapeSm90 bwd_shape_sm90(int head_dim, bool modifies_scores) {
    return last_row(kBwdShapesSm90, [&](const BwdShapeSm90& row) {
        return row.head_dim == head_dim && !(row.plain_scores && modifies_scores);
    });
}
// Consumers that own columns have one semaphore each per dQ tile.
constexpr cuda::WorkspaceShape workspace_shape(const BwdShapeSm90& shape) {
    return {.block_m = shape.block_m,
            .tile_elements = shape.block_m * shape.head_dim,
            .turns = shape.owns_columns() ? shape.consumers : 1,
            .pads_rows = true};
}

}  // namespace flash_attn
