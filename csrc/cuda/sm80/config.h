// Tile shapes by head_dim and by how much shared memory a block may have.
//
// Small: within 99 KB, which is all that compute capability 8.6, 8.9 and 12.x give to a block. Large: within 163 KB,
// which 8.0 gives, and 9.0 more; LargeModified: the same for ModifiedScore.
#pragma once
#include <type_traits>
#include "cuda/instances.h"
#include "cuda/sm80/bwd_config.h"
#include "cuda/sm80/fwd.h"
#include "policy/variant.h"

namespace flash_attn {

constexpr int kSmallSmemBytes = 99 * 1024, kLargeSmemBytes = 163 * 1024;

// FwdConfigSm80<Element, head_dim, queries, keys, warps>. Warps of 32 queries load each tile of keys half as often from
// shared memory as warps of 16; from head_dim 192 on their accumulators would not fit into registers.
template <class Element, int kHeadDim> struct FwdTilesSm80;
template <class Element> struct FwdTilesSm80<Element, 64> {
    using Small = FwdConfigSm80<Element, 64, 128, 64, 4>;
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct FwdTilesSm80<Element, 96> {
    using Small = FwdConfigSm80<Element, 96, 128, 64, 4>;
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct FwdTilesSm80<Element, 128> {
    using Small = FwdConfigSm80<Element, 128, 128, 32, 4>;  // 64 keys need more registers than there are
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct FwdTilesSm80<Element, 192> {
    using Small = FwdConfigSm80<Element, 192, 128, 64, 8>;
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct FwdTilesSm80<Element, 256> {
    using Small = FwdConfigSm80<Element, 256, 64, 64, 4>;
    using Large = FwdConfigSm80<Element, 256, 128, 64, 8>;
    using LargeModified = Large;
};

// BwdConfigSm80<Element, head_dim, queries, keys, warps, rows of warps in S, in dK and dV, in dQ, parts of dQ>.
template <class Element, int kHeadDim> struct BwdTilesSm80;
template <class Element> struct BwdTilesSm80<Element, 64> {
    using Small = BwdConfigSm80<Element, 64, 64, 128, 8, 2, 4, 4, 1>;
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct BwdTilesSm80<Element, 96> {
    using Small = BwdConfigSm80<Element, 96, 64, 64, 8, 4, 4, 4, 1>;
    using Large = Small;
    using LargeModified = Large;
};
template <class Element> struct BwdTilesSm80<Element, 128> {
    using Small = BwdConfigSm80<Element, 128, 64, 64, 8, 4, 4, 4, 1>;
    using Large = BwdConfigSm80<Element, 128, 64, 96, 8, 4, 2, 4, 1>;
    using LargeModified = Small;  // random numbers and softcap need registers too
};
template <class Element> struct BwdTilesSm80<Element, 192> {
    using Small = BwdConfigSm80<Element, 192, 32, 64, 8, 2, 4, 2, 3>;
    using Large = BwdConfigSm80<Element, 192, 64, 64, 8, 4, 4, 4, 1>;
    using LargeModified = Large;
};
template <class Element> struct BwdTilesSm80<Element, 256> {
    using Small = BwdConfigSm80<Element, 256, 32, 32, 4, 2, 2, 2, 2>;
    using Large = BwdConfigSm80<Element, 256, 64, 64, 8, 4, 4, 4, 2>;
    using LargeModified = Large;
};

// f(Type<Config>) for what a device has room for.
template <class Tiles, class Variant, class F> auto with_tiles(const cuda::Device& device, F f) {
    using Small = typename Tiles::Small;
    using Large = std::conditional_t<Variant::kModified, typename Tiles::LargeModified, typename Tiles::Large>;
    static_assert(Small::kSmemBytes <= kSmallSmemBytes && Large::kSmemBytes <= kLargeSmemBytes);
    if constexpr (!std::is_same_v<Small, Large>)
        if (device.smem_per_block >= kLargeSmemBytes) return f(cuda::Type<Large>());
    return f(cuda::Type<Small>());
}

}  // namespace flash_attn
