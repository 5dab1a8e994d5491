// A variant of attention: a mask (policy/mask.h) and a score (policy/score.h), made once per head of a sequence. CPU,
// GPU and simulator get masking and scoring only from here.
#pragma once
#include "policy/host_device.h"
#include "policy/mask.h"
#include "policy/range_mask.h"
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

// The variants that GPU kernels are compiled for: calls f(Type<Variant>) with the cheapest one that covers the problem.
template <class F> auto with_variant(const Problem& p, F f) {
    const auto with_score = [&](auto mask) {
        using Mask = typename decltype(mask)::type;
        return modifies_scores(p) ? f(Type<AttentionVariant<Mask, ModifiedScore<float>>>())
                                  : f(Type<AttentionVariant<Mask, PlainScore<float>>>());
    };
    if (p.key_ranges.ranges) return f(Type<AttentionVariant<RangeMask, ModifiedScore<float>>>());
    return masks_keys(p) ? with_score(Type<WindowMask>()) : with_score(Type<FullMask>());
}

}  // namespace flash_attn
