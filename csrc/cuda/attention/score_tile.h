// The scores of a register tile (policy/score.h). PlainScore costs nothing here: what is not asked for is not compiled.
#pragma once
#include "cuda/attention/coordinates.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/acc_tile.h"
#include "policy/score.h"

namespace flash_attn {

struct DeviceMath {
    // To about 1e-7, of itself where it is small. The instruction tanh.approx is off by 5e-4, which a softcap of 50
    // makes an error of 0.025.
    FA_DEVICE static float tanh(float x) {
        const float square = x * x;
        const float series = 1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315)));
        const float large = 1.f - 2.f * ptx::reciprocal(ptx::exp2(x * float(2 * kLog2e)) + 1.f);
        return square < 0.04f ? x * series : large;
    }
};

// Products become scores such that exp2(scale_log2 * score - ...) is the softmax: one stage after another, each for the
// whole tile, so that what does not apply to the head is one branch.
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

// f(value, whether it is dropped) for every element.
template <int kRows, int kCols, class F>
FA_DEVICE void for_each_drawn(AccTile<kRows, kCols>& t, const DropoutMask& dropout, const QueryRows& at, F f) {
    // One call of Philox serves 32 keys, of which narrower tiles hold one half.
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
// A thread has two of the four keys that a call of Philox serves: lane / 4, and the one 8 after it.
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
// Dropped weights become zero.
template <class Score, int kRows, int kCols, class At>
FA_DEVICE void drop(AccTile<kRows, kCols>& p, const Score& score, const At& at) {
    if constexpr (Score::kModified) {
        if (score.dropout.threshold == 0) return;
        for_each_drawn(p, score.dropout, at, [](float& x, bool dropped) { x = dropped ? 0.f : x; });
    }
}
// Dropped weights get a set sign bit, kept ones a clear one.
template <class Score, int kRows, int kCols, class At>
FA_DEVICE void mark_dropped(AccTile<kRows, kCols>& p, const Score& score, const At& at) {
    if constexpr (Score::kModified) {
        if (score.dropout.threshold == 0) return;
        for_each_drawn(p, score.dropout, at, [](float& x, bool dropped) {
            x = ptx::bits_float((ptx::float_bits(x) & 0x7fffffffu) | uint32_t(dropped) << 31);
        });
    }
}
// Whether mark_dropped() marked this weight.
FA_DEVICE bool is_dropped(float weight) { return ptx::float_bits(weight) >> 31; }

// What the kept weights of a row are to be multiplied with.
template <class Score> FA_DEVICE float kept_weight_scale(const Score& score) {
    if constexpr (Score::kModified)
        return score.dropout_rescale;
    else
        return 1.f;
}

}  // namespace flash_attn
