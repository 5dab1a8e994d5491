// Prints, for the static report, with how many threads and how much shared memory every kernel is launched: one line
// of JSON per kernel and tile shape. Compiled by g++ against the host models of simulator: it needs no CUDA toolkit.
#include <cstdio>
#include <typeinfo>
#include <utility>
#include "cuda/sm80/bwd_config.h"
#include "cuda/sm80/fwd_config.h"
#include "cuda/sm90/bwd_config.h"
#include "cuda/sm90/fwd_config.h"

using namespace flash_attn;

// One pass of the main loop of a block. warps: how many go through it; products: multiply-adds; parts: how often a loop
// within it that computes products turns; filled: bytes that TMA writes to shared memory; reduced: bytes that it adds
// to sums in global memory; alternates: half of the warps have a product to compute that the others are spared.
struct Pass {
    int warps = 0, products = 0, parts = 1, filled_bytes = 0, reduced_bytes = 0;
    bool alternates = false;
};

template <class Config> constexpr int head_dim_v() {
    if constexpr (requires { Config::kHeadDimV; })
        return Config::kHeadDimV;
    else
        return Config::kHeadDim;
}

// config: the mangled name of the type; the report looks for the element type and the shape in it.
template <class Config> void print(const char* kernel, int threads, int smem_bytes, const Pass& pass = {}) {
    std::printf("{\"kernel\": \"%s\", \"config\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, ", kernel,
                typeid(Config).name(), Config::kHeadDim, head_dim_v<Config>());
    std::printf("\"block_m\": %d, \"block_n\": %d, \"threads\": %d, \"smem_bytes\": %d, \"warps\": %d, ",
                Config::kBlockM, Config::kBlockN, threads, smem_bytes, pass.warps);
    std::printf("\"products\": %d, \"parts\": %d, \"filled_bytes\": %d, ", pass.products, pass.parts,
                pass.filled_bytes);
    std::printf("\"reduced_bytes\": %d, \"alternates\": %s}\n", pass.reduced_bytes, pass.alternates ? "true" : "false");
}

// A pass of the kernels for compute capability 8.0: so many products of queries x keys x head_dim, by all warps.
template <class Config> Pass pass_sm80(int times, int parts = 1) {
    return {Config::kThreads / kWarpThreads, times * Config::kBlockM * Config::kBlockN * Config::kHeadDim, parts};
}
template <class Config> void print_fwd() {
    print<Config>("fwd_sm80", Config::kThreads, Config::kSmemBytes, pass_sm80<Config>(2));
}
template <class Config> void print_probs() {
    print<Config>("attn_probs_sm80", Config::kThreads, Config::kSmemBytes, pass_sm80<Config>(1));
}
template <class Config> void print_bwd() {
    print<Config>("bwd_preprocess", Config::kPreprocessThreads, sizeof(typename Config::PreprocessSmem));
    print<Config>("bwd_sm80", Config::kThreads, Config::kSmemBytes, pass_sm80<Config>(5, Config::kDqParts));
    print<Config>("bwd_postprocess", Config::kThreads, 0);
}

// Those for 9.0: the consumers compute, the other warpgroup loads.
template <class Config> void print_fwd_sm90() {
    constexpr int kProducts = Config::kBlockM * Config::kBlockN * (Config::kHeadDim + Config::kHeadDimV);
    constexpr int kFilled = Config::TileK::kBytes + Config::TileV::kBytes;
    print<Config>("fwd_sm90", Config::kThreads, Config::kSmemBytes, {4 * Config::kConsumers, kProducts, 1, kFilled});
}
template <class Config> void print_bwd_sm90() {
    constexpr int kProducts = 5 * Config::kBlockM * Config::kBlockN * Config::kHeadDim;
    constexpr int kFilled = 2 * (Config::TileQ::kBytes + Config::kRowBytes);
    // By TMA. Where consumers own columns they add to dQ themselves.
    constexpr int kReduced = Config::kOwnsColumns ? 0 : Config::kDqTileElements * 4;
    print<Config>("bwd_preprocess", Config::kPreprocessThreads, sizeof(typename Config::PreprocessSmem));
    print<Config>("bwd_sm90", Config::kThreads, Config::kSmemBytes,
                  {4 * Config::kConsumers, kProducts, 1, kFilled, kReduced, !Config::kOwnsColumns});
    print<Config>("bwd_postprocess", Config::kPostprocessThreads, 0);
}

// f.template operator()<i>() for every row of a table.
template <class Shape, size_t kRows, class F> void for_each_row(const Shape (&)[kRows], F f) {
    [&]<size_t... i>(std::index_sequence<i...>) {
        (f.template operator()<i>(), ...);
    }(std::make_index_sequence<kRows>());
}

template <class Element> void print_element() {
    for_each_row(kFwdShapesSm80, []<size_t i>() {
        print_fwd<FwdConfigSm80<Element, kFwdShapesSm80[i]>>();
        if (!kFwdShapesSm80[i].large_smem) print_probs<FwdConfigSm80<Element, kFwdShapesSm80[i]>>();
    });
    for_each_row(kBwdShapesSm80, []<size_t i>() { print_bwd<BwdConfigSm80<Element, kBwdShapesSm80[i]>>(); });
    for_each_row(kFwdShapesSm90, []<size_t i>() { print_fwd_sm90<FwdConfigSm90<Element, kFwdShapesSm90[i]>>(); });
    for_each_row(kBwdShapesSm90, []<size_t i>() { print_bwd_sm90<BwdConfigSm90<Element, kBwdShapesSm90[i]>>(); });
}

int main() {
    print_element<bf16>();
    print_element<fp16>();
}
