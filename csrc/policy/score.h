// From a product q . k to the score, the input of softmax:
//     score = cap(softmax_scale * product) - slope * |row + shift - key|,   cap(x) = softcap * tanh(x / softcap)
// ALiBi is added after softcap. Also: the derivative of the score with respect to the scaled product, and the dropout
// mask. Templates over the number type: float on a GPU, vectors of float or double on the CPU.
#pragma once
#include "policy/dropout.h"
#include "policy/host_device.h"
#include "policy/scalars.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

// ALiBi bias (Press et al., "Train short, test long", section 3), symmetric so that it needs no causal mask.
template <class Real, class T> FA_HOST_DEVICE T alibi_bias(Real slope, T distance) {
    return -slope * (distance < T{} ? -distance : distance);
}

// d cap(x) / dx, given t = tanh(x / softcap).
template <class T> FA_HOST_DEVICE T softcap_derivative(T t) { return 1 - t * t; }

FA_HOST_DEVICE float alibi_slope(const ScoreParams& p, int batch, int head) {
    return p.alibi_slopes ? p.alibi_slopes[batch * p.alibi_batch_stride + head] : 0.f;
}
// Of ScoreParams: whether softcap or ALiBi applies. Of a Problem: whether PlainScore is not enough; no variant has it
// together with key ranges.
FA_HOST_DEVICE bool modifies_scores(const ScoreParams& p) { return p.softcap > 0 || p.alibi_slopes; }
FA_HOST_DEVICE bool modifies_scores(const Problem& p) {
    return modifies_scores(p.score) || p.dropout.threshold != 0 || p.key_ranges.ranges;
}

// Scores are scaled products. The scale is not applied here: softmax multiplies products by scale_log2.
template <class Real> struct PlainScore {
    static constexpr bool kModified = false;
    Real scale_log2;

    FA_HOST_DEVICE PlainScore(const Problem& p, const Sequence&, int /*batch*/, int /*head*/)
        : scale_log2(scalars_of<Real>(p).scale_log2) {}
};

// Scores of one head with softcap, ALiBi or dropout.
template <class Real> struct ModifiedScore {
    static constexpr bool kModified = true;
    static constexpr Real scale_log2 = Real(kLog2e);  // scores are natural logarithms
    Real scale, scale_over_cap, softcap, slope;
    int shift;
    DropoutMask dropout;
    Real dropout_rescale;

    FA_HOST_DEVICE ModifiedScore(const Problem& p, const Sequence& seq, int batch, int head)
        : scale(scalars_of<Real>(p).scale), scale_over_cap(scalars_of<Real>(p).scale_over_cap),
          softcap(scalars_of<Real>(p).softcap), slope(alibi_slope(p.score, batch, head)), shift(seq.shift),
          dropout(p, seq, batch, head), dropout_rescale(scalars_of<Real>(p).dropout_rescale) {}

    // Distance from the key to the query's position; positive if the key comes first.
    FA_HOST_DEVICE int distance(int row, int key) const { return row + shift - key; }

    // transform() has up to three stages: scale or softcap, then bias; a head skips the stages that do not apply to it.
    // Math: provides tanh for T.
    static constexpr int kStages = 3;
    template <int kStage> FA_HOST_DEVICE bool applies() const {
        return kStage == 0 ? !has_derivative() : kStage == 1 ? has_derivative() : slope != 0;
    }
    template <int kStage, class Math, class T> FA_HOST_DEVICE T stage(T x, T distance) const {
        if constexpr (kStage == 0) return x * scale;
        if constexpr (kStage == 1) return softcap * Math::tanh(x * scale_over_cap);
        if constexpr (kStage == 2) return x + alibi_bias(slope, distance);
    }

    // d score / d (scale * product) as a function of the product or, once the tile is transformed, of the score.
    FA_HOST_DEVICE bool has_derivative() const { return softcap > 0; }
    template <class Math, class T> FA_HOST_DEVICE T derivative(T product) const {
        return softcap_derivative(Math::tanh(product * scale_over_cap));
    }
    template <class T> FA_HOST_DEVICE T derivative_of_score(T score, T distance) const {
        return softcap_derivative((score - alibi_bias(slope, distance)) / softcap);
    }
};

}  // namespace flash_attn
