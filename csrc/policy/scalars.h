// The numbers of a problem as GPUs want them: in fp32, rounded once, on the host. Double precision is slow there.
#pragma once
#include "policy/dropout.h"
#include "policy/score.h"
#include "problem.h"

namespace flash_attn {

inline void round_scalars(Problem& p) {
    p.scalars = {float(p.score.softmax_scale), float(p.score.softmax_scale * kLog2e), float(p.score.softcap),
                 float(dropout_rescale(p.dropout))};
}

}  // namespace flash_attn
