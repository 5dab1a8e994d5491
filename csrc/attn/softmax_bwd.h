// The softmax of the backward pass: FlashAttention-2, algorithm 2. What a query has to know of its other keys is in two
// numbers, its log-sum-exp and dsoftmax_sum.
#pragma once
#include "attn/score_tile.h"
#include "attn/softmax.h"
#include "ptx/global.h"
#include "ptx/math.h"
#include "tile/acc_tile.h"

namespace flash_attn {

// In the log2 domain. What sees no key has -infinity, or +infinity, as others write it: +infinity makes every weight
// zero.
FA_DEVICE float lse_log2_of(float lse) { return lse == -ptx::infinity() ? ptx::infinity() : lse * float(kLog2e); }

// Scores become weights: zero where lse_log2 is +infinity. kSelect: and where scores are -infinity, even in a row with
// a log-sum-exp that is NaN, because one of the keys that it does see is.
template <bool kSelect, int kRows, int kCols, int kLaneRows>
FA_DEVICE void recompute_weights(AccTile<kRows, kCols>& s, const float (&lse_log2)[kLaneRows], float scale_log2) {
    s.for_each([&](int r, int, float& x) {
        const float weight = ptx::exp2(x * scale_log2 - lse_log2[r]);
        x = kSelect && x == -ptx::infinity() ? 0.f : weight;
    });
}

// dP becomes dS, the gradient of scaled products; weights that mark_dropped() marked become what dV is made of.
// row0 and key0 are the tile's corner in the score matrix. kSelect: pairs that do not attend may have a dP that is not
// finite.
template <bool kSelect, class Scores, int kRows, int kCols, int kLaneRows>
FA_DEVICE void score_gradient(AccTile<kRows, kCols>& p, AccTile<kRows, kCols>& dp,
                              const float (&dsoftmax_sum)[kLaneRows], const float (&lse_log2)[kLaneRows],
                              const Scores& scores, int row0, int key0) {
    dp.zip(p, [&](int r, int column, float& x, float& weight) {
        float w = weight;
        if constexpr (Scores::kModified) {
            x = is_dropped(weight) ? 0.f : x * scores.dropout_scale;
            weight = is_dropped(weight) ? 0.f : weight * scores.dropout_scale;
            w = fabsf(w);
        }
        x = kSelect && w == 0.f ? 0.f : w * (x - dsoftmax_sum[r]);
        if constexpr (Scores::kModified) {
            if (scores.softcap > 0.f && w != 0.f) {
                const float score = (ptx::log2(w) + lse_log2[r]) * float(1 / kLog2e);
                x *= scores.cap_derivative(score, row0 + lane_row(r), key0 + column);
            }
        }
    });
}

}  // namespace flash_attn
