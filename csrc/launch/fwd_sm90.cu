// The forward pass for compute capability 9.0, for one FA_ELEMENT and FA_HEAD_DIM.
#include "kernels/fwd_sm90.h"
#include "launch/dispatch.h"
#include "launch/hopper.h"
#include "launch/instances.h"
#include "launch/launch.h"
#include "launch/tile_config_sm90.h"
#include "launch/tma_tensor.h"

namespace flash_attn::cuda {
namespace {

// Tiles that all take as long are divided among as many blocks as run at a time. Otherwise every tile has a block of
// its own, and whichever multiprocessor is free takes the next. Where they take little time, starting a block costs
// more than an unequal division: head_dim 64, up to so many tiles in a head (benchmarks/results/nvidia-h200,
// experiment 3).
template <class Config> int64_t blocks_for(const Problem& p, const TileGrid& grid, const Device& device) {
    constexpr int kFewTiles = Config::kHeadDim == 64 ? 22 : 0;
    const bool alike = !p.seqlens.cu_seqlens_q && !p.seqlens.cu_seqlens_k && !p.seqlens.seqused_k;
    const bool divides = alike && (is_full(p.window) || grid.num_tiles <= kFewTiles);
    return divides ? min<int64_t>(grid.num_blocks(), device.multiprocessors) : grid.num_blocks();
}

template <class Config, class Mask, class Scores>
const char* launch_fwd(const FwdParams& params, const Device& device) {
    const Problem& p = params.problem;
    FwdKernelParamsSm90 kernel_params{};
    kernel_params.pass = params;
    const int64_t head_bytes = int64_t(p.seqlens.seqlen_k) * (p.head_dim + p.head_dim_v) * TmaStrides::kElementBytes;
    const TileGrid grid = query_grid(p, Config::kBlockM);
    kernel_params.order = {grid, section_heads(p, grid, device, head_bytes, p.num_heads / p.num_heads_k)};
    const int64_t blocks = blocks_for<Config>(p, grid, device);
    kernel_params.num_blocks = static_cast<int>(blocks);
    const TensorSize q = query_size(p, p.head_dim), k = key_size(p, p.head_dim), v = key_size(p, p.head_dim_v);
    const TensorSize out = query_size(p, p.head_dim_v);
    const char* error = make_tma_tensor("q", kernel_params.q, p.q, q, Config::kBlockM);
    if (!error) error = make_tma_tensor("k", kernel_params.k, p.k, k, Config::kBlockN);
    if (!error) error = make_tma_tensor("v", kernel_params.v, p.v, v, Config::kBlockN);
    if (!error) error = make_tma_tensor("out", kernel_params.out, params.out, out, kWarpgroupRows);
    if (error) return error;
    return launch(fwd_sm90<Config, Mask, Scores>, blocks, Config::kThreads, Config::kSmemBytes, device, kernel_params);
}

template <class Tiles> const char* run_with(const FwdParams& params, const Device& device) {
    return with_policies(params.problem, [&](auto mask, auto scores) {
        using Scores = typename decltype(scores)::type;
        using Config = std::conditional_t<Scores::kModified, typename Tiles::Modified, typename Tiles::Plain>;
        return launch_fwd<Config, typename decltype(mask)::type, Scores>(params, device);
    });
}

}  // namespace

template <class Element, int kHeadDim> const char* run_fwd_sm90(const FwdParams& params, const Device& device) {
    if constexpr (kHeadDim == 192)
        if (params.problem.head_dim_v <= 128) return run_with<FwdTilesSm90<Element, 192, 128>>(params, device);
    return run_with<FwdTilesSm90<Element, kHeadDim, kHeadDim>>(params, device);
}

template const char* run_fwd_sm90<FA_ELEMENT, FA_HEAD_DIM>(const FwdParams&, const Device&);

}  // namespace flash_attn::cuda
