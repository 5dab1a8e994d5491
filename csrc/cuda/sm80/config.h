// Tile shapes for compute capability 8.0 and later. Plain data, also read by the host: it allocates the workspace
// before any kernel runs.
//
// The last row that fits a head_dim is used. Rows with large_smem need 163 KB of shared memory per block, as on 8.0 and
// 9.0; the others fit the 99 KB of 8.6, 8.9 and 12.x. Rows with plain_scores have no registers left for softcap, ALiBi
// and dropout.
#pragma once
#include "cuda/attention/workspace.h"
#include "cuda/shape_table.h"

namespace flash_attn {

constexpr int kHeadDimsSm80[] = {
#include "cuda/sm80/head_dims.inl"
};

constexpr int kSmallSmemBytes = 99 * 1024, kLargeSmemBytes = 163 * 1024;

// Warps of 32 queries load each key tile from shared memory half as often as warps of 16; from head_dim 192 on their
// accumulators would not fit into registers.
struct FwdShapeSm80 {
    int head_dim, block_m, block_n, warps;
    bool large_smem = false;
};
constexpr FwdShapeSm80 kFwdShapesSm80[] = {
    {.head_dim = 64, .block_m = 128, .block_n = 64, .warps = 4},
    {.head_dim = 96, .block_m = 128, .block_n = 64, .warps = 4},
    {.head_dim = 128, .block_m = 128, .block_n = 32, .warps = 4},  // 64 keys would spill registers
    {.head_dim = 192, .block_m = 128, .block_n = 64, .warps = 8},
    {.head_dim = 256, .block_m = 64, .block_n = 64, .warps = 4},
    {.head_dim = 256, .block_m = 128, .block_n = 64, .warps = 8, .large_smem = true},
};

constexpr FwdShapeSm80 fwd_shape_sm80(int head_dim, bool large_smem) {
    return last_row(kFwdShapesSm80, [&](const FwdShapeSm80& row) {
        return row.head_dim == head_dim && (large_smem || !row.large_smem);
    });
}

// rows_*: number of warps along the rows of S and dP, of dK and dV, and of dQ. dQ is computed in dq_parts column parts,
// one after the other, where its accumulators do not fit beside those of dK and dV.
struct BwdShapeSm80 {
    int head_dim, block_m, block_n, warps;
    int rows_s, rows_dkv, rows_dq, dq_parts = 1;
    bool large_smem = false, plain_scores = false;
};
// clang-format off
constexpr BwdShapeSm80 kBwdShapesSm80[] = {
    {.head_dim = 64, .block_m = 64, .block_n = 128, .warps = 8, .rows_s = 2, .rows_dkv = 4, .rows_dq = 4},
    {.head_dim = 96, .block_m = 64, .block_n = 64, .warps = 8, .rows_s = 4, .rows_dkv = 4, .rows_dq = 4},
    {.head_dim = 128, .block_m = 64, .block_n = 64, .warps = 8, .rows_s = 4, .rows_dkv = 4, .rows_dq = 4},
    {.head_dim = 128, .block_m = 64, .block_n = 96, .warps = 8, .rows_s = 4, .rows_dkv = 2, .rows_dq = 4,
     .large_smem = true, .plain_scores = true},
    {.head_dim = 192, .block_m = 32, .block_n = 64, .warps = 8, .rows_s = 2, .rows_dkv = 4, .rows_dq = 2,
     .dq_parts = 3},
    {.head_dim = 192, .block_m = 64, .block_n = 64, .warps = 8, .rows_s = 4, .rows_dkv = 4, .rows_dq = 4,
     .large_smem = true},
    {.head_dim = 256, .block_m = 32, .block_n = 32, .warps = 4, .rows_s = 2, .rows_dkv = 2, .rows_dq = 2,
     .dq_parts = 2},
    {.head_dim = 256, .block_m = 64, .block_n = 64, .warps = 8, .rows_s = 4, .rows_dkv = 4, .rows_dq = 4,
     .dq_parts = 2, .large_smem = true},
};
// clang-format on

constexpr BwdShapeSm80 bwd_shape_sm80(int head_dim, bool large_smem, bool modifies_scores) {
    return last_row(kBwdShapesSm80, [&](const BwdShapeSm80& row) {
        return row.head_dim == head_dim && (large_smem || !row.large_smem) && !(row.plain_scores && modifies_scores);
    });
}
constexpr cuda::WorkspaceShape workspace_shape(const BwdShapeSm80& shape) {
    return {.block_m = shape.block_m, .tile_elements = shape.block_m * shape.head_dim, .turns = 1, .pads_rows = false};
}

}  // namespace flash_attn
