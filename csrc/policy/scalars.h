// The scalars of a problem in the precision of the kernels, rounded once on the host: double precision is slow on GPUs.
#pragma once
#include <type_traits>
#include "policy/dropout.h"
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

constexpr double kLog2e = 1.4426950408889634;

template <class Real> FA_HOST_DEVICE Scalars<Real> make_scalars(const Problem& p) {
    const ScoreParams& s = p.score;
    return {Real(s.softmax_scale), Real(s.softmax_scale * kLog2e),
            s.softcap > 0 ? Real(s.softmax_scale / s.softcap) : Real(0), Real(s.softcap),
            Real(dropout_rescale(p.dropout))};
}

// Fills p.scalars: the last step of preparing a problem for the GPU kernels.
inline void round_scalars(Problem& p) { p.scalars = make_scalars<float>(p); }

template <class Real> FA_HOST_DEVICE Scalars<Real> scalars_of(const Problem& p) {
    if constexpr (std::is_same_v<Real, float>)
        return p.scalars;
    else
        return make_scalars<Real>(p);
}

}  // namespace flash_attn
