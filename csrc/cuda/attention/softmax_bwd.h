// Softmax of the backward pass: FlashAttention-2, algorithm 2. The row statistics are LSE and dsoftmax_sum.
#pragma once
#include "cuda/attention/score_tile.h"
#include "cuda/attention/softmax.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/acc_tile.h"

namespace flash_attn {

// LSE in the log2 domain. A row without visible keys has -infinity, or +infinity from flash_attn 2.8.3; returns
// +infinity for both, which makes every weight zero.
FA_DEVICE float lse_log2_of(float lse) { return lse == -ptx::infinity() ? ptx::infinity() : lse * float(kLog2e); }

// Scores become weights; zero where lse_log2 is +infinity. kSelect: also zero where the score is -infinity, even if LSE
// is NaN because a visible key is NaN.
template <bool kSelect, int kRows, int kCols, class Numbers>
FA_DEVICE void recompute_weights(AccTile<kRows, kCols>& s, Numbers lse_log2, float scale_log2) {
    s.for_each_octet([&](int n) { lse_log2.select(n); },
                     [&](int r, int b, int, float& x) {
                         const float log2_weight = x * scale_log2 - lse_log2(r, b);
                         x = ptx::exp2(kSelect && x == -ptx::infinity() ? x : log2_weight);
                     });
}

// dP becomes dS, the gradient of scaled products; P becomes the weights of dV: dropped or rescaled. kSelect: dP of
// hidden pairs may be NaN or infinity.
template <bool kSelect, class Score, class At, class Numbers, int kRows, int kCols>
FA_DEVICE void score_gradient(AccTile<kRows, kCols>& p, AccTile<kRows, kCols>& dp, Numbers dsoftmax_sum,
                              Numbers lse_log2, const Score& score, const At& at) {
    const auto select = [&](int n) {
        dsoftmax_sum.select(n);
        if constexpr (Score::kModified) lse_log2.select(n);
    };
    dp.zip_octets(p, select, [&](int r, int b, int column, float& x, float& weight) {
        float w = weight;
        if constexpr (Score::kModified) {
            x = is_dropped(weight) ? 0.f : x * score.dropout_rescale;
            weight = is_dropped(weight) ? 0.f : weight * score.dropout_rescale;
            w = fabsf(w);
        }
        x = kSelect && w == 0.f ? 0.f : w * (x - dsoftmax_sum(r, b));
        if constexpr (Score::kModified) {
            if (score.has_derivative() && w != 0.f) {
                const float natural = (ptx::log2(w) + lse_log2(r, b)) * float(1 / kLog2e);
                const float distance = float(score.distance(at.query(r, column), at.key(r, column)));
                x *= score.derivative_of_score(natural, distance);
            }
        }
    });
}

}  // namespace flash_attn
