// From a product q . k to the score that softmax sees:
//     score = cap(softmax_scale * product) - slope * |row + shift - key|,   cap(x) = softcap * tanh(x / softcap)
// in this order (ALiBi is added to capped scores), and the derivative of the score with respect to the scaled product.
// Templates over the number type: float on a GPU, vectors on the CPU.
#pragma once
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

constexpr double kLog2e = 1.4426950408889634;

// The bias of ALiBi (Press et al., "Train short, test long", section 3), symmetric so that it needs no causal mask.
template <class T> FA_HOST_DEVICE T alibi_bias(T slope, T distance) {
    return -slope * (distance < T{} ? -distance : distance);
}

// d cap(x) / dx, given t = tanh(x / softcap).
template <class T> FA_HOST_DEVICE T softcap_derivative(T t) { return 1 - t * t; }

FA_HOST_DEVICE float alibi_slope(const ScoreParams& p, int batch, int head) {
    return p.alibi_slopes ? p.alibi_slopes[batch * p.alibi_batch_stride + head] : 0.f;
}
// Whether scores are more than scaled products.
FA_HOST_DEVICE bool modifies_scores(const ScoreParams& p) { return p.softcap > 0 || p.alibi_slopes; }
FA_HOST_DEVICE bool modifies_scores(const Problem& p) { return modifies_scores(p.score) || p.dropout.threshold != 0; }

}  // namespace flash_attn
