// From what is known when a kernel is called to what was known when it was compiled.
#pragma once
#include <type_traits>
#include "attn/mask.h"
#include "attn/score_tile.h"
#include "kernels.h"
#include "launch/tile_config.h"

namespace flash_attn::cuda {

template <class T> struct Type { using type = T; };

// f(Type<Config>, Type<Mask>, Type<Scores>) for the tiles, the mask and the scores that a problem on this device needs.
template <class Tiles, class F> const char* with_policies(const Problem& p, const Device& device, F f) {
    static_assert(fits<Tiles>());
    const auto with_tiles = [&](auto mask, auto scores, auto large) {
        using Large = typename decltype(large)::type;
        if constexpr (!std::is_same_v<typename Tiles::Small, Large>)
            if (device.smem_per_block >= kLargeSmemBytes) return f(large, mask, scores);
        return f(Type<typename Tiles::Small>(), mask, scores);
    };
    const auto with_scores = [&](auto mask) {
        if (modifies_scores(p.score) || p.dropout.threshold != 0)
            return with_tiles(mask, Type<ModifiedScores>(), Type<typename Tiles::LargeModified>());
        return with_tiles(mask, Type<PlainScores>(), Type<typename Tiles::Large>());
    };
    return is_full(p.window) ? with_scores(Type<FullMask>()) : with_scores(Type<WindowMask>());
}

}  // namespace flash_attn::cuda
