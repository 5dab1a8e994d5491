// A variant of attention: which keys a query sees (policy/mask.h) and what its scores are (policy/score.h), made once
// per head of a sequence. All that CPU, GPU and simulator know of either they ask of this.
#pragma once
#include "policy/host_device.h"
#include "policy/mask.h"
#include "policy/score.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

template <class Mask_, class Score_> struct AttentionVariant {
    using Mask = Mask_;
    using Score = Score_;
    static constexpr bool kMasked = Mask::kMasked, kModified = Score::kModified;
    Mask mask;
    Score score;

    FA_HOST_DEVICE AttentionVariant(const Problem& p, const Sequence& seq, int batch, int head)
        : mask(Mask::of(p, seq, batch, head)), score(p, seq, batch, head) {}
};

// The list of variants that GPU kernels are compiled for: f(Type<Variant>) for the least that serves a problem.
template <class F> auto with_variant(const Problem& p, F f) {
    const auto with_score = [&](auto mask) {
        using Mask = typename decltype(mask)::type;
        return modifies_scores(p) ? f(Type<AttentionVariant<Mask, ModifiedScore<float>>>())
                                  : f(Type<AttentionVariant<Mask, PlainScore<float>>>());
    };
    return masks_keys(p) ? with_score(Type<WindowMask>()) : with_score(Type<FullMask>());
}

}  // namespace flash_attn
