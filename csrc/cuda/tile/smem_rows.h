// One fp32 value per row of a tile, in shared memory.
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/shared.h"
#include "cuda/tile/lane.h"
#include "policy/host_device.h"

namespace flash_attn {

template <int kRows> struct SmemRows {
    static constexpr int kBytes = kRows * 4;
    ptx::SmemPtr base;

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }

    // Starts copying with cp.async; rows from valid_rows on are zero-filled. At least kRows threads must call it. The
    // caller commits.
    FA_DEVICE void load(const float* rows, int valid_rows) const {
        const int row = ptx::thread_idx();
        const bool valid = row < valid_rows;
        if (row < kRows) ptx::cp_async_4(base + 4 * row, valid ? rows + row : rows, valid ? 4 : 0);
    }
    // The values of a lane's rows, relative to row0.
    template <int kLaneRows> FA_DEVICE void get(float (&x)[kLaneRows], int row0) const {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) x[r] = ptx::bits_float(ptx::load_shared(base + 4 * (row0 + lane_row(r))));
    }
};

}  // namespace flash_attn
