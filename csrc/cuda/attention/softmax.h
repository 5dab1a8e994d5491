// Online softmax of the forward pass: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and
// FlashAttention-2, section 3.1. Each thread keeps row max and row sum of its rows, in the log2 domain.
#pragma once
#include "cuda/attention/coordinates.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/acc_tile.h"
#include "policy/score.h"

namespace flash_attn {

// Sets scores with is_hidden(query, key) to -infinity.
template <int kRows, int kCols, class At, class IsHidden>
FA_DEVICE void hide_if(AccTile<kRows, kCols>& s, const At& at, IsHidden is_hidden) {
    const auto hide = [&](int r, int column, float& x) {
        if (is_hidden(at.query(r, column), at.key(r, column))) x = -ptx::infinity();
    };
    s.for_each(hide, at.first_column());
}
// The window of a mask, and the rest of what it hides.
template <class Mask> FA_DEVICE const auto& window_of(const Mask& mask) {
    if constexpr (Mask::kHasRanges)
        return mask.window;
    else
        return mask;
}
template <int kRows, int kCols, class Mask, class At>
FA_DEVICE void hide_outside_ranges(AccTile<kRows, kCols>& s, const Mask& mask, const At& at) {
    if constexpr (Mask::kHasRanges) hide_if(s, at, [&](int row, int key) { return !mask.in_range(row, key); });
}
template <int kRows, int kCols, class Mask, class At>
FA_DEVICE void apply_mask(AccTile<kRows, kCols>& s, const Mask& mask, const At& at) {
    hide_if(s, at, [&](int query, int key) { return !window_of(mask).keep(query, key); });
    hide_outside_ranges(s, mask, at);
}
// The same result with half of the comparisons for most tiles, which a single mask edge crosses. Needs a few registers.
// With ranges, most tiles that need masking are crossed by a range.
template <int kRows, int kCols, class Mask, class At>
FA_DEVICE void apply_mask_by_edge(AccTile<kRows, kCols>& s, const Mask& mask, const At& at) {
    if constexpr (Mask::kHasRanges) {
        hide_if(s, at, [&](int row, int key) { return !mask.template keep<At::kByKey>(row, key); });
    } else {
        const Range queries = at.queries(kRows, kCols), keys = at.keys(kRows, kCols);
        if (mask.template crosses<Edge::kAfter, At::kByKey>(queries, keys))
            hide_if(s, at, [&](int row, int key) { return mask.template hides<Edge::kAfter, At::kByKey>(row, key); });
        if (mask.template crosses<Edge::kBefore, At::kByKey>(queries, keys))
            hide_if(s, at, [&](int row, int key) { return mask.template hides<Edge::kBefore, At::kByKey>(row, key); });
    }
}

// Max over the four lanes that share a row.
FA_DEVICE float quad_max(float x) {
    x = fmaxf(x, ptx::shfl_xor(x, 1));
    return fmaxf(x, ptx::shfl_xor(x, 2));
}
FA_DEVICE float quad_sum(float x) {
    x += ptx::shfl_xor(x, 1);
    return x + ptx::shfl_xor(x, 2);
}

template <int kLaneRows> struct OnlineSoftmax {
    float row_max[kLaneRows], row_sum[kLaneRows];  // row_sum covers this lane's columns only, until finish()
    float offset[kLaneRows];                       // row_max * scale_log2
    float rescale_factor[kLaneRows];               // factor for the row sum and O from before the last update_max()

    FA_DEVICE OnlineSoftmax() {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
            row_max[r] = -ptx::infinity();
            row_sum[r] = offset[r] = 0.f;
        }
    }
    // Updates row max with these scores and rescales the row sum. The caller must then rescale the accumulator of O
    // with rescale().
    template <int kRows, int kCols> FA_DEVICE void update_max(const AccTile<kRows, kCols>& s, float scale_log2) {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) rescale_factor[r] = row_max[r];
        s.for_each([&](int r, int, float x) { row_max[r] = fmaxf(row_max[r], x); });
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
            row_max[r] = quad_max(row_max[r]);
            // A row without visible keys so far must not compute infinity - infinity.
            offset[r] = row_max[r] == -ptx::infinity() ? 0.f : row_max[r] * scale_log2;
            // Exactly 1 if the max is unchanged: otherwise the product minus a rounded product leaves a rounding error,
            // the same one in every tile.
            rescale_factor[r] =
                rescale_factor[r] == row_max[r] ? 1.f : ptx::exp2(rescale_factor[r] * scale_log2 - offset[r]);
            row_sum[r] *= rescale_factor[r];
        }
    }
    template <int kRows, int kCols> FA_DEVICE void rescale(AccTile<kRows, kCols>& out) const {
        out.for_each([&](int r, int, float& x) { x *= rescale_factor[r]; });
    }
    // Turns scores into weights exp2(scale_log2 * score - offset), and adds them to row_sum.
    template <int kRows, int kCols> FA_DEVICE void exp_and_sum(AccTile<kRows, kCols>& s, float scale_log2) {
        s.for_each([&](int r, int, float& x) {
            x = ptx::exp2(x * scale_log2 - offset[r]);
            row_sum[r] += x;
        });
    }
    // Divides by the row sums; a row without visible keys becomes 0. sink: a score added to every row, a natural
    // logarithm; -infinity: none. lse: natural log-sum-exp of the scores and the sink.
    template <int kRows, int kCols>
    FA_DEVICE void finish(AccTile<kRows, kCols>& out, float weight_scale, float sink, float (&lse)[kLaneRows]) {
        float factor[kLaneRows];
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
            row_sum[r] = quad_sum(row_sum[r]);
            factor[r] = row_sum[r] == 0.f ? 0.f : weight_scale * ptx::reciprocal(row_sum[r]);
            lse[r] = (offset[r] + ptx::log2(row_sum[r])) * float(1 / kLog2e);
            if (sink != -ptx::infinity()) add_sink(r, weight_scale, sink, factor[r], lse[r]);
        }
        out.for_each([&](int r, int, float& x) { x *= factor[r]; });
    }

private:
    // Weights are relative to the larger of the row max and the sink, so that neither of them overflows.
    FA_DEVICE void add_sink(int r, float weight_scale, float sink, float& factor, float& lse) const {
        // log2 of the weight of the sink; +infinity in a row without visible keys.
        const float above = row_max[r] == -ptx::infinity() ? sink - row_max[r] : fmaf(sink, float(kLog2e), -offset[r]);
        const float rescale = above > 0.f ? ptx::exp2(-above) : 1.f;
        const float sum = row_sum[r] * rescale + (above > 0.f ? 1.f : ptx::exp2(above));
        factor = weight_scale * rescale * ptx::reciprocal(sum);
        // log2(1) is 0: the log-sum-exp of the sink alone is the sink.
        const float log_sum = ptx::log2(sum);
        lse = above > 0.f ? fmaf(log_sum, float(1 / kLog2e), sink) : (offset[r] + log_sum) * float(1 / kLog2e);
    }
};

// The attention sink of a head; -infinity: none.
FA_DEVICE float sink_of(const ScoreParams& p, int head) {
    return p.sinks ? static_cast<const float*>(p.sinks)[head] : -ptx::infinity();
}

}  // namespace flash_attn
