// Tile shapes for compute capability 9.0, by head_dim.
#pragma once
#include "kernels/bwd_config_sm90.h"
#include "kernels/fwd_config_sm90.h"

namespace flash_attn {

// FwdConfigSm90<Element, head_dim, head_dim_v, queries, keys, stages>. Plain is for scores that are only scaled,
// Modified for softcap, ALiBi and dropout, which need registers of their own.
template <class Element, int kHeadDim, int kHeadDimV> struct FwdTilesSm90;
template <class Element> struct FwdTilesSm90<Element, 64, 64> {
    using Plain = FwdConfigSm90<Element, 64, 64, 192, 128, 2>;
    using Modified = FwdConfigSm90<Element, 64, 64, 128, 128, 2>;
};
template <class Element> struct FwdTilesSm90<Element, 96, 96> {
    using Plain = FwdConfigSm90<Element, 96, 96, 128, 128, 2>;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 128, 128> {
    using Plain = FwdConfigSm90<Element, 128, 128, 128, 128, 2>;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 192, 128> {
    using Plain = FwdConfigSm90<Element, 192, 128, 128, 128, 2>;
    using Modified = Plain;
};
template <class Element> struct FwdTilesSm90<Element, 192, 192> {
    using Plain = FwdConfigSm90<Element, 192, 192, 128, 112, 2>;
    using Modified = FwdConfigSm90<Element, 192, 192, 128, 96, 2>;
};
template <class Element> struct FwdTilesSm90<Element, 256, 256> {
    using Plain = FwdConfigSm90<Element, 256, 256, 128, 80, 2>;
    using Modified = FwdConfigSm90<Element, 256, 256, 128, 64, 2>;
};

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
