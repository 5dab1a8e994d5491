// The backward pass for compute capability 9.0, for one FA_ELEMENT and FA_HEAD_DIM: three kernels, one after another.
#include "cuda/attention/bwd_postprocess.h"
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/place_workspace.h"
#include "cuda/instance.h"
#include "cuda/launch.h"
#include "cuda/sm90/bwd.h"
#include "cuda/sm90/launch_plan.h"
#include "cuda/sm90/tma_tensor.h"

namespace flash_attn::cuda {
namespace {

template <class Config> const char* make_tensors(BwdKernelParamsSm90& kernel_params, const BwdParams& params) {
    const Problem& p = params.problem;
    const TensorSize q = query_size(p, p.head_dim), dout = query_size(p, p.head_dim_v);
    const TensorSize k = key_size(p, p.head_dim), v = key_size(p, p.head_dim_v);
    const char* error = make_tma_tensor("q", kernel_params.q, p.q, q, Config::kBlockM);
    if (!error) error = make_tma_tensor("dout", kernel_params.dout, params.dout, dout, Config::kBlockM);
    if (!error) error = make_tma_tensor("k", kernel_params.k, p.k, k, Config::kBlockN);
    if (!error) error = make_tma_tensor("v", kernel_params.v, p.v, v, Config::kBlockN);
    if (error || p.float_results) return error;
    error = make_tma_tensor("dk", kernel_params.dk, params.dk, k, Config::kOutRows);
    if (!error) error = make_tma_tensor("dv", kernel_params.dv, params.dv, v, Config::kOutRows);
    return error;
}

template <class Config, class Variant>
const char* launch_bwd(const BwdParams& params, void* workspace, const Device& device) {
    const Problem& p = params.problem;
    BwdKernelParamsSm90 kernel_params{};
    kernel_params.common = {params, place_workspace(workspace, p, Config::kWorkspace)};
    const int64_t query_blocks = query_grid(p, Config::kBlockM).num_blocks();
    const TileGrid key_tiles = key_grid(p, Config::kBlockN);
    // Bytes per query that a key head reads: Q and dO, and dQ in fp32.
    const int64_t row_bytes = (p.head_dim + p.head_dim_v) * TmaStrides::kElementBytes + p.head_dim * int64_t(4);
    const int64_t head_bytes = p.num_heads / p.num_heads_k * int64_t(p.seqlens.seqlen_q) * row_bytes;
    if (const char* error = check_tiles(key_tiles.num_blocks())) return error;
    kernel_params.order = make_tile_order(key_tiles, l2_head_group(p, key_tiles, device, head_bytes, 1));
    kernel_params.heads_per_key_head = p.num_heads / p.num_heads_k;
    kernel_params.blocks_at_a_time = device.multiprocessors;
    const char* error = make_tensors<Config>(kernel_params, params);
    if (!error)
        error = launch(bwd_preprocess<Config>, query_blocks, Config::kPreprocessThreads,
                       sizeof(typename Config::PreprocessSmem), device, kernel_params.common);
    if (!error)
        error = launch_pdl(bwd_sm90<Config, Variant>, key_tiles.num_blocks(), Config::kThreads, Config::kSmemBytes,
                           device, kernel_params);
    if (!error)
        error = launch_pdl(bwd_postprocess<Config>, query_blocks, Config::kPostprocessThreads, 0, device,
                           kernel_params.common);
    return error;
}

}  // namespace

template <>
const char* bwd_instance<90, FA_ELEMENT, FA_HEAD_DIM>(const BwdParams& params, void* workspace, const Device& device) {
    using Element = FA_ELEMENT;
    constexpr int kHeadDim = FA_HEAD_DIM;
    return with_variant(params.problem, [&](auto variant) {
        using Variant = typename decltype(variant)::type;
        using Config = BwdConfigSm90<Element, bwd_shape_sm90(kHeadDim, Variant::kModified)>;
        return launch_bwd<Config, Variant>(params, workspace, device);
    });
}

}  // namespace flash_attn::cuda
