// The elements of a tile that a lane holds, as fixed by mma.sync: lane t of a warp holds rows t / 4 and t / 4 + 8 of
// every 16, and columns 2 (t % 4) and 2 (t % 4) + 1 of every 8.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn {

constexpr int kWarpThreads = 32;

FA_DEVICE int lane_id() { return ptx::thread_idx() % kWarpThreads; }
FA_DEVICE int warp_id() { return ptx::thread_idx() / kWarpThreads; }

// The same values, recomputed at every use: saves registers where the compiler would keep values derived from them.
FA_DEVICE uint32_t fresh_thread_idx() { return ptx::opaque(static_cast<uint32_t>(ptx::thread_idx())); }
FA_DEVICE uint32_t fresh_lane_id() { return fresh_thread_idx() % kWarpThreads; }

// Row of the tile of the lane's r-th row: r = 0, 1 are in the first 16 rows, r = 2, 3 in the next 16, and so on.
FA_DEVICE int lane_row(int r) { return r / 2 * 16 + r % 2 * 8 + lane_id() / 4; }
// The first of the lane's two columns in the first 8.
FA_DEVICE int lane_column() { return lane_id() % 4 * 2; }

}  // namespace flash_attn
