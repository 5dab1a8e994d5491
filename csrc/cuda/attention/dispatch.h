// From what is known when a kernel is called to what was known when it was compiled.
#pragma once
#include "cuda/api.h"
#include "cuda/attention/score_tile.h"
#include "cuda/instances.h"
#include "policy/mask.h"

namespace flash_attn::cuda {

// f(Type<Mask>, Type<Scores>) for the mask and the scores that a problem needs.
template <class F> const char* with_policies(const Problem& p, F f) {
    const auto with_scores = [&](auto mask) {
        return modifies_scores(p) ? f(mask, Type<ModifiedScores>()) : f(mask, Type<PlainScores>());
    };
    return is_full(p.window) ? with_scores(Type<FullMask>()) : with_scores(Type<WindowMask>());
}

}  // namespace flash_attn::cuda
