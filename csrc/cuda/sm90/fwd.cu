// The forward pass for compute capability 9.0, for one FA_ELEMENT and FA_HEAD_DIM.
#include "cuda/instance.h"
#include "cuda/launch.h"
#include "cuda/sm90/fwd.h"
#include "cuda/sm90/launch_plan.h"
#include "cuda/sm90/tma_tensor.h"

namespace flash_attn::cuda {
namespace {

// Persistent blocks, one per SM, share the tiles: statically if all tiles take the same time or there is at most one
// tile per block, otherwise dynamically. taken: counter of the tiles that were taken dynamically.
const char* divide_tiles(TileShares& shares, const TileGrid& grid, int head_group, const Problem& p, int32_t* taken,
                         const Device& device) {
    const int64_t tiles = grid.num_blocks();
    if (const char* error = check_tiles(tiles)) return error;
    const bool alike = !masks_keys(p) && !p.seqlens.cu_seqlens_q && !p.seqlens.cu_seqlens_k && !p.seqlens.seqused_k;
    const bool fixed = alike || tiles <= device.multiprocessors;
    shares = {make_tile_order(grid, head_group), static_cast<int>(min<int64_t>(tiles, device.multiprocessors)),
              fixed ? nullptr : taken};
    return fixed ? nullptr : clear(taken, sizeof *taken, device);
}

// The repeat list follows the tile counter.
FwdRepeats place_repeats(const Problem& p, void* workspace) {
    static_assert(sizeof(FwdRepeat) == kFwdRepeatBytes && kFwdRepeatRows == kWarpgroupRows);
    char* const places = static_cast<char*>(workspace) + kFwdCounterBytes;
    return {reinterpret_cast<FwdRepeat*>(places), static_cast<int32_t>(fwd_repeat_places(p))};
}

template <class Config, class Variant>
const char* launch_fwd(const FwdParams& params, void* workspace, const Device& device) {
    const Problem& p = params.problem;
    FwdKernelParamsSm90 kernel_params{};
    kernel_params.pass = params;
    const int64_t head_bytes = int64_t(p.seqlens.seqlen_k) * (p.head_dim + p.head_dim_v) * TmaStrides::kElementBytes;
    const TileGrid grid = query_grid(p, Config::kBlockM);
    const int head_group = l2_head_group(p, grid, device, head_bytes, p.num_heads / p.num_heads_k);
    const TensorSize q = query_size(p, p.head_dim), k = key_size(p, p.head_dim), v = key_size(p, p.head_dim_v);
    const TensorSize out = query_size(p, p.head_dim_v);
    const char* error = make_tma_tensor("q", kernel_params.q, p.q, q, kWarpgroupRows);
    if (!error) error = make_tma_tensor("k", kernel_params.k, p.k, k, Config::kBlockN);
    if (!error) error = make_tma_tensor("v", kernel_params.v, p.v, v, Config::kBlockN);
    if (!error && !p.float_results) error = make_tma_tensor("out", kernel_params.out, params.out, out, kWarpgroupRows);
    if (!error) error = check_tiles(fwd_repeat_places(p));
    if (!error)
        error = divide_tiles(kernel_params.shares, grid, head_group, p, static_cast<int32_t*>(workspace), device);
    kernel_params.repeats = place_repeats(p, workspace);
    if (error) return error;
    return launch(fwd_sm90<Config, Variant>, kernel_params.shares.num_blocks, Config::kThreads, Config::kSmemBytes,
                  device, kernel_params);
}

template <class Element, int kHeadDim, int kHeadDimV>
const char* run_with(const FwdParams& params, void* workspace, const Device& device) {
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        constexpr FwdShapeSm90 kLong = fwd_shape_sm90(kHeadDim, kHeadDimV, Variant::kModified, false);
        constexpr FwdShapeSm90 kShort = fwd_shape_sm90(kHeadDim, kHeadDimV, Variant::kModified, true);
        // Equal block_n: otherwise the summation order, and the bits of a sequence's result, would depend on its batch.
        static_assert(kShort.block_n == kLong.block_n);
        return !Variant::kModified && prefers_short(params.problem, kHeadDim, kHeadDimV)
                   ? launch_fwd<FwdConfigSm90<Element, kShort>, Variant>(params, workspace, device)
                   : launch_fwd<FwdConfigSm90<Element, kLong>, Variant>(params, workspace, device);
    });
}

}  // namespace

template <>
const char* fwd_instance<90, FA_ELEMENT, FA_HEAD_DIM>(const FwdParams& params, void* workspace, const Device& device) {
    using Element = FA_ELEMENT;
    constexpr int kHeadDim = FA_HEAD_DIM;
    constexpr int kNarrow = fwd_head_dim_v_sm90(kHeadDim, 1);
    if (params.problem.head_dim_v <= kNarrow) return run_with<Element, kHeadDim, kNarrow>(params, workspace, device);
    return run_with<Element, kHeadDim, kHeadDim>(params, workspace, device);
}

}  // namespace flash_attn::cuda
