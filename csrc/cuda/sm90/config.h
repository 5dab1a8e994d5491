// Tile shapes for compute capability 9.0, by head_dim.
#pragma once
#include <type_traits>
#include "cuda/sm90/bwd_config.h"
#include "cuda/sm90/fwd_config.h"
#include "policy/tile_order.h"

namespace flash_attn {

// FwdConfigSm90<Element, head_dim, head_dim_v, queries, keys, stages>. Plain is for scores that are only scaled; Short
// too, where prefers_short() says that tiles of fewer queries are quicker; Modified is for softcap, ALiBi and dropout,
// which need registers of their own.
template <class Element, int kHeadDim, int kHeadDimV> struct FwdTilesSm90;
template <class Element> struct FwdTilesSm90<Element, 64, 64> {
    using Plain = FwdConfigSm90<Element, 64, 64, 192, 128, 4>;
    using Short = FwdConfigSm90<Element, 64, 64, 128, 128, 4>;
    using Modified = Short;
};
template <class Element> struct FwdTilesSm90<Element, 96, 96> {
    using Plain = FwdConfigSm90<Element, 96, 96, 128, 128, 2>;
    using Short = Plain;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 128, 128> {
    using Plain = FwdConfigSm90<Element, 128, 128, 128, 128, 2>;
    using Short = Plain;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 192, 128> {
    using Plain = FwdConfigSm90<Element, 192, 128, 128, 128, 2>;
    using Short = Plain;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 192, 192> {
    using Plain = FwdConfigSm90<Element, 192, 192, 128, 112, 2>;
    using Short = Plain;
    using Modified = FwdConfigSm90<Element, 192, 192, 128, 96, 2>;
};
template <class Element> struct FwdTilesSm90<Element, 256, 256> {
    using Plain = FwdConfigSm90<Element, 256, 256, 128, 80, 2>;
    using Short = Plain;
    using Modified = FwdConfigSm90<Element, 256, 256, 128, 64, 2>;
};

// Microseconds on an H200 (benchmarks/results/nvidia-h200, experiment 12) for a tile of queries of head_dim 64, and for
// every tile of keys that it sees.
template <class Config> double estimated_time(const Problem& p) {
    static_assert(Config::kHeadDim == 64 && Config::kBlockN == 128);
    static_assert(Config::kBlockM == 128 || Config::kBlockM == 192);
    constexpr double kTileTime = Config::kBlockM == 192 ? 1.96 : 1.74, kKeysTime = Config::kBlockM == 192 ? 1.51 : 1.15;
    const auto mask = WindowMask::of(p, {0, 0, p.seqlens.seqlen_q, p.seqlens.seqlen_k}, 0, 0);
    double time = 0;
    for (int m0 = 0; m0 < p.seqlens.seqlen_q; m0 += Config::kBlockM) {
        const Range tiles = tiles_of(mask.kv_range({m0, m0 + Config::kBlockM}), Config::kBlockN);
        time += kTileTime + kKeysTime * max(tiles.end - tiles.begin, 0);
    }
    return time;
}

// Whether Short is quicker than Plain. Long sequences are always better off with the larger tiles.
template <class Tiles> bool prefers_short(const Problem& p) {
    using Short = typename Tiles::Short;
    using Plain = typename Tiles::Plain;
    constexpr int kLongestShort = 2048;
    // Sums run over the same tiles of keys, or the bits of a sequence would depend on what else is in its batch.
    static_assert(Short::kBlockN == Plain::kBlockN);
    if constexpr (std::is_same_v<Short, Plain>)
        return false;
    else
        return p.seqlens.seqlen_q <= kLongestShort && estimated_time<Short>(p) < estimated_time<Plain>(p);
}

// BwdConfigSm90<Element, head_dim, queries, keys>.
template <class Element, int kHeadDim> struct BwdTilesSm90;
template <class Element> struct BwdTilesSm90<Element, 64> {
    using Plain = BwdConfigSm90<Element, 64, 128, 128>;
    using Modified = BwdConfigSm90<Element, 64, 64, 128>;
};
template <class Element> struct BwdTilesSm90<Element, 96> {
    using Plain = BwdConfigSm90<Element, 96, 64, 128>;
    using Modified = Plain;
};
template <class Element> struct BwdTilesSm90<Element, 128> {
    using Plain = BwdConfigSm90<Element, 128, 64, 128>;
    using Modified = Plain;
};
template <class Element> struct BwdTilesSm90<Element, 192> {
    using Plain = BwdConfigSm90<Element, 192, 64, 96>;
    using Modified = Plain;
};
template <class Element> struct BwdTilesSm90<Element, 256> {
    using Plain = BwdConfigSm90<Element, 256, 64, 80>;
    using Modified = BwdConfigSm90<Element, 256, 64, 64>;  // dropout draws for 32 keys at a time
};

}  // namespace flash_attn
