// Prints, for the static report, with how many threads and how much shared memory every kernel is launched: one line
// of JSON per kernel and tile shape. Compiled by g++ against the host models of tests/sim: it needs no CUDA toolkit.
#include <cstdio>
#include <cstring>
#include <typeinfo>
#include "launch/tile_config.h"

using namespace flash_attn;

// products: how many of queries x keys x head_dim one pass of the main loop computes; parts: how often a loop within it
// that computes products turns.
struct Launch {
    const char* kernel;
    int threads, smem_bytes, products, parts;
};

// The tile shape as it appears in the names of kernels: the mangled name of the type, without the namespace around it.
template <class Config> void print(const Launch& launch) {
    const char* const name = typeid(Config).name() + std::strlen("N10flash_attn");
    std::printf("{\"kernel\": \"%s\", \"config\": \"%.*s\", \"head_dim\": %d, \"block_m\": %d, \"block_n\": %d, ",
                launch.kernel, int(std::strlen(name)) - 1, name, Config::kHeadDim, Config::kBlockM, Config::kBlockN);
    std::printf("\"threads\": %d, \"smem_bytes\": %d, \"products\": %d, \"parts\": %d}\n", launch.threads,
                launch.smem_bytes, launch.products, launch.parts);
}

template <class Config> void print_fwd() { print<Config>({"fwd_sm80", Config::kThreads, Config::kSmemBytes, 2, 1}); }
template <class Config> void print_probs() {
    print<Config>({"attn_probs_sm80", Config::kThreads, Config::kSmemBytes, 1, 1});
}
template <class Config> void print_bwd() {
    print<Config>({"bwd_preprocess", Config::kPreprocessThreads, Config::kPreprocessSmemBytes, 0, 1});
    print<Config>({"bwd_sm80", Config::kThreads, Config::kSmemBytes, 5, Config::kDqParts});
    print<Config>({"bwd_finish", Config::kThreads, 0, 0, 1});
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
