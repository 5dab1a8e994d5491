// Prints, for the static report, with how many threads and how much shared memory every kernel is launched: one line
// of JSON per kernel and tile shape. Compiled by g++ against the host models of tests/sim: it needs no CUDA toolkit.
#include <cstdio>
#include <cstring>
#include <typeinfo>
#include "cuda/sm80/config.h"
#include "cuda/sm90/config.h"

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

// The tile shape as it appears in the names of kernels: the mangled name of the type, without the namespace around it.
template <class Config> void print(const char* kernel, int threads, int smem_bytes, const Pass& pass = {}) {
    const char* const name = typeid(Config).name() + std::strlen("N10flash_attn");
    std::printf("{\"kernel\": \"%s\", \"config\": \"%.*s\", \"head_dim\": %d, \"head_dim_v\": %d, ", kernel,
                int(std::strlen(name)) - 1, name, Config::kHeadDim, head_dim_v<Config>());
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
    print<Config>("bwd_preprocess", Config::kPreprocessThreads, Config::kPreprocessSmemBytes);
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
    print<Config>("bwd_preprocess", Config::kPreprocessThreads, Config::kPreprocessSmemBytes);
    print<Config>("bwd_sm90", Config::kThreads, Config::kSmemBytes,
                  {4 * Config::kConsumers, kProducts, 1, kFilled, kReduced, !Config::kOwnsColumns});
    print<Config>("bwd_postprocess", Config::kPostprocessThreads, 0);
}

template <class Tiles> void print_fwd_tiles_sm90() {
    print_fwd_sm90<typename Tiles::Plain>();
    print_fwd_sm90<typename Tiles::Short>();
    print_fwd_sm90<typename Tiles::Modified>();
}

template <class Element, int kHeadDim> void print_head_dim() {
    using Fwd = FwdTilesSm80<Element, kHeadDim>;
    using Bwd = BwdTilesSm80<Element, kHeadDim>;
    print_fwd<typename Fwd::Small>();
    print_fwd<typename Fwd::Large>();
    print_fwd<typename Fwd::LargeModified>();
    print_bwd<typename Bwd::Small>();
    print_bwd<typename Bwd::Large>();
    print_bwd<typename Bwd::LargeModified>();
    print_probs<typename Fwd::Small>();
    print_fwd_tiles_sm90<FwdTilesSm90<Element, kHeadDim, kHeadDim>>();
    if constexpr (kHeadDim == 192) print_fwd_tiles_sm90<FwdTilesSm90<Element, 192, 128>>();
    print_bwd_sm90<typename BwdTilesSm90<Element, kHeadDim>::Plain>();
    print_bwd_sm90<typename BwdTilesSm90<Element, kHeadDim>::Modified>();
}

template <class Element> void print_element() {
    print_head_dim<Element, 64>();
    print_head_dim<Element, 96>();
    print_head_dim<Element, 128>();
    print_head_dim<Element, 192>();
    print_head_dim<Element, 256>();
}

int main() {
    print_element<bf16>();
    print_element<fp16>();
}
