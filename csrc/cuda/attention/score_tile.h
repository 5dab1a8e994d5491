// Scores of a register tile (policy/score.h). For PlainScore all of this compiles to nothing.
#pragma once
#include "cuda/attention/coordinates.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/acc_tile.h"
#include "policy/score.h"

namespace flash_attn {

struct DeviceMath {
    // Error about 1e-7, relative to the result where it is small. The instruction tanh.approx is off by 5e-4, which a
    // softcap of 50 turns into an error of 0.025.
    FA_DEVICE static float tanh(float x) {
        const float square = x * x;
        const float series = 1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315)));
        const float large = 1.f - 2.f * ptx::reciprocal(ptx::exp2(x * float(2 * kLog2e)) + 1.f);
        return square < 0.04f ? x * series : large;
    }
};

// Turns products into scores such that exp2(scale_log2 * score - ...) is the softmax. Each stage covers the whole tile,
// so that a stage that does not apply to the head costs one branch.
template <int kStage = 0, class Score, int kRows, int kCols, class At>
FA_DEVICE void transform(AccTile<kRows, kCols>& s, const Score& score, const At& at) {
    if constexpr (Score::kModified) {
        if constexpr (kStage < Score::kStages) {
            if (score.template applies<kStage>())
                s.for_each([&](int r, int column, float& x) {
                    const float distance = float(score.distance(at.query(r, column), at.key(r, column)));
                    x = score.template stage<kStage, DeviceMath>(x, distance);
                });
            transform<kStage + 1>(s, score, at);
        }
    }
}

// Calls f(value, is_dropped) for every element.
template <int kRows, int kCols, class F>
FA_DEVICE void for_each_drawn(AccTile<kRows, kCols>& t, const DropoutMask& dropout, const QueryRows& at, F f) {
    // One Philox call covers 32 keys; narrower tiles hold half of them.
    constexpr int kKeys = kCols % kDropoutBlockKeys == 0 ? kDropoutBlockKeys : 16;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kCols / kKeys; ++j)
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int key = at.key0 + kKeys * j;
                const PhiloxOutput drawn = dropout.block(at.query(2 * i, 0), key + lane_column() + b);
                const bool upper = kKeys == 16 && key / 16 % 2;
#pragma unroll
                for (int w = 0; w < kKeys / 8; ++w) {
                    const uint32_t word = upper ? drawn.word[(w + 2) % 4] : drawn.word[w];
                    float* const x = &t.x[i][(kKeys / 8 * j + w) * 4 + b];
                    f(x[0], (word & 0xffffu) < dropout.threshold);
                    f(x[2], (word >> 16) < dropout.threshold);
                }
            }
}
// A lane holds two of the four keys of a Philox call: lane / 4 and lane / 4 + 8.
template <int kRows, int kCols, class F>
FA_DEVICE void for_each_drawn(AccTile<kRows, kCols>& t, const DropoutMask& dropout, const KeyRows& at, F f) {
    static_assert(kRows == 16);
    const int upper = at.key(0, 0) % kDropoutBlockKeys / 16 * 2;
#pragma unroll
    for (int j = 0; j < kCols / 16; ++j)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const PhiloxOutput drawn = dropout.block(at.row0 + 16 * j + lane_column() + b, at.key(0, 0));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t word = upper ? drawn.word[2 + r] : drawn.word[r];
                float* const x = &t.x[0][8 * j + 2 * r + b];
                f(x[0], (word & 0xffffu) < dropout.threshold);
                f(x[4], (word >> 16) < dropout.threshold);
            }
        }
}
// Zeroes dropped weights.
template <class Score, int kRows, int kCols, class At>
FA_DEVICE void drop(AccTile<kRows, kCols>& p, const Score& score, const At& at) {
    if constexpr (Score::kModified) {
        if (score.dropout.threshold == 0) return;
        for_each_drawn(p, score.dropout, at, [](float& x, bool dropped) { x = dropped ? 0.f : x; });
    }
}
// Sets the sign bit of dropped weights and clears that of kept ones.
template <class Score, int kRows, int kCols, class At>
FA_DEVICE void mark_dropped(AccTile<kRows, kCols>& p, const Score& score, const At& at) {
    if constexpr (Score::kModified) {
        if (score.dropout.threshold == 0) return;
        for_each_drawn(p, score.dropout, at, [](float& x, bool dropped) {
            x = ptx::bits_float((ptx::float_bits(x) & 0x7fffffffu) | uint32_t(dropped) << 31);
        });
    }
}
// Whether mark_dropped() marked this weight as dropped.
FA_DEVICE bool is_dropped(float weight) { return ptx::float_bits(weight) >> 31; }

// Factor from what transform() leaves to scores in natural logarithms.
template <class Score> FA_DEVICE float natural_scale(const Score&, const Problem& p) {
    return Score::kModified ? 1.f : p.scalars.scale;
}

// Rescale factor of the kept weights of a row.
template <class Score> FA_DEVICE float kept_weight_scale(const Score& score) {
    if constexpr (Score::kModified)
        return score.dropout_rescale;
    else
        return 1.f;
}

}  // namespace flash_attn
