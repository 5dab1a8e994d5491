// Scores of a register tile: scale, softcap, ALiBi (policy/score.h) and dropout (policy/dropout.h). Two policies, since
// what is not asked for must cost nothing: PlainScores are products times the softmax scale, ModifiedScores are the
// rest.
//
// Scores leave apply() such that exp2(scale_log2 * score - ...) is the softmax.
#pragma once
#include "cuda/attention/coordinates.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/acc_tile.h"
#include "policy/dropout.h"
#include "policy/score.h"
#include "policy/seqlen.h"
#include "policy/tile_order.h"

namespace flash_attn {

struct PlainScores {
    static constexpr bool kModified = false;
    float scale_log2;

    FA_DEVICE PlainScores(const Problem& p, int, int, const Sequence&) : scale_log2(p.scalars.scale_log2) {}
    template <class Tile, class At> FA_DEVICE void apply(Tile&, const At&) const {}
};

// tanh to about 1e-7, of itself where it is small. The instruction tanh.approx is off by 5e-4, which a softcap of 50
// makes an error of 0.025.
FA_DEVICE float tanh_of(float x) {
    const float square = x * x;
    const float series = 1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315)));
    const float large = 1.f - 2.f * ptx::reciprocal(ptx::exp2(x * float(2 * kLog2e)) + 1.f);
    return square < 0.04f ? x * series : large;
}

struct ModifiedScores {
    static constexpr bool kModified = true;
    static constexpr float scale_log2 = float(kLog2e);  // scores are natural logarithms
    float scale, softcap, slope;
    int shift;
    DropoutMask dropout;
    float dropout_scale;

    FA_DEVICE ModifiedScores(const Problem& p, int batch, int head, const Sequence& seq)
        : scale(p.scalars.scale), softcap(p.scalars.softcap), slope(alibi_slope(p.score, batch, head)),
          shift(seq.seqlen_k - seq.seqlen_q), dropout(p.dropout, batch, head, p.num_heads),
          dropout_scale(p.scalars.dropout_rescale) {}

    FA_DEVICE float bias(int row, int key) const { return alibi_bias(slope, float(row + shift - key)); }

    template <int kRows, int kCols, class At> FA_DEVICE void apply(AccTile<kRows, kCols>& s, const At& at) const {
        if (softcap > 0.f) {
            const float inner = scale * ptx::reciprocal(softcap);
            s.for_each([&](int, int, float& x) { x = softcap * tanh_of(x * inner); });
        } else {
            s.for_each([&](int, int, float& x) { x *= scale; });
        }
        if (slope == 0.f) return;
        s.for_each([&](int r, int column, float& x) { x += bias(at.query(r, column), at.key(r, column)); });
    }

    // d cap(x) / dx from the score itself, so that nothing has to be kept for it.
    FA_DEVICE float cap_derivative(float score, int row, int key) const {
        return softcap_derivative((score - bias(row, key)) / softcap);
    }

    // f(value, whether it is dropped) for every element.
    template <int kRows, int kCols, class F>
    FA_DEVICE void for_each_drawn(AccTile<kRows, kCols>& t, const QueryRows& at, F f) const {
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
    FA_DEVICE void for_each_drawn(AccTile<kRows, kCols>& t, const KeyRows& at, F f) const {
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
    template <int kRows, int kCols, class At> FA_DEVICE void drop(AccTile<kRows, kCols>& p, const At& at) const {
        if (dropout.threshold == 0) return;
        for_each_drawn(p, at, [](float& x, bool dropped) { x = dropped ? 0.f : x; });
    }
    // Dropped weights get a set sign bit, kept ones a clear one.
    template <int kRows, int kCols, class At>
    FA_DEVICE void mark_dropped(AccTile<kRows, kCols>& p, const At& at) const {
        if (dropout.threshold == 0) return;
        for_each_drawn(p, at, [](float& x, bool dropped) {
            x = ptx::bits_float((ptx::float_bits(x) & 0x7fffffffu) | uint32_t(dropped) << 31);
        });
    }
};

// Whether mark_dropped() marked this weight.
FA_DEVICE bool is_dropped(float weight) { return ptx::float_bits(weight) >> 31; }

}  // namespace flash_attn
