// Which part of a tile a thread holds. mma.sync fixes it: lane t of a warp holds rows t / 4 and t / 4 + 8 of every 16,
// and columns 2 (t % 4) and the one after it of every 8.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn {

constexpr int kWarpThreads = 32;

FA_DEVICE int lane_id() { return ptx::thread_idx() % kWarpThreads; }
FA_DEVICE int warp_id() { return ptx::thread_idx() / kWarpThreads; }

// The same, computed here and now, where registers are short and the compiler would keep what follows from it.
FA_DEVICE uint32_t fresh_thread_idx() { return ptx::opaque(static_cast<uint32_t>(ptx::thread_idx())); }
FA_DEVICE uint32_t fresh_lane_id() { return fresh_thread_idx() % kWarpThreads; }

// The row of a tile that the lane's r-th row is: r counts 0, 1 in the first 16 rows, 2, 3 in the next, and so on.
FA_DEVICE int lane_row(int r) { return r / 2 * 16 + r % 2 * 8 + lane_id() / 4; }
// The first of the lane's two columns in the first 8.
FA_DEVICE int lane_column() { return lane_id() % 4 * 2; }

}  // namespace flash_attn
