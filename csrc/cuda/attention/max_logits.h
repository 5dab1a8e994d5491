// The largest score of each head, as softmax sees them, without sinks.
#pragma once
#include "cuda/attention/softmax.h"
#include "cuda/ptx/global.h"

namespace flash_attn {

// NaN if one of the two is.
FA_DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// The largest score of a warp's first valid_rows rows, in lane 0; NaN if one of them is. After finish(). scale: from
// row_max to scores.
template <int kLaneRows>
FA_DEVICE float largest_score(const OnlineSoftmax<kLaneRows>& softmax, float scale, int valid_rows) {
    float largest = -ptx::infinity();
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        const float row_max = softmax.row_max[r], row_sum = softmax.row_sum[r];
        // The maximum passes over NaN, but the sum is NaN then. It also is where the maximum is infinity.
        const bool is_nan = row_sum != row_sum && row_max != ptx::infinity();
        if (lane_row(r) < valid_rows) largest = max_or_nan(largest, is_nan ? row_sum : row_max * scale);
    }
#pragma unroll
    for (int mask = 4; mask < kWarpThreads; mask *= 2) largest = max_or_nan(largest, ptx::shfl_xor(largest, mask));
    return largest;
}

// Called by every warp with the first valid_rows rows of its own. The result does not depend on the order of warps.
template <int kLaneRows, class Score> FA_DEVICE void add_max_logit(const FwdParams& pass, int batch, int head,
                                                                   const OnlineSoftmax<kLaneRows>& softmax,
                                                                   const Score& score, int valid_rows) {
    if (!pass.max_logits) return;
    const Problem& p = pass.problem;
    const float largest = largest_score(softmax, natural_scale(score, p), valid_rows);
    float* const max_logits = static_cast<float*>(pass.max_logits) + int64_t(batch) * p.num_heads + head;
    if (lane_id() == 0) ptx::red_max(max_logits, largest);
}

}  // namespace flash_attn
