// Bytes of global memory that the kernels move, counted by the simulator, for growing sequences and for tiles of
// several sizes: one line of JSON each. One head, no mask, head_dim 64. benchmarks/plot_io.py draws them.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "cuda/attention/bwd_postprocess.h"
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/launch.h"
#include "cuda/sm80/bwd.h"
#include "cuda/sm80/config.h"
#include "cuda/sm80/fwd.h"
#include "policy/scalars.h"

using namespace flash_attn;

namespace {

constexpr int kHeadDim = 64;
constexpr cuda::Device kDevice{80, kLargeSmemBytes, 1, 1, nullptr};

// Zeros: only where bytes go matters here. Not freed.
void* zeros(int64_t bytes) {
    void* const data = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
    for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(data)[i] = 0;
    return data;
}
TensorView tensor(int seqlen) { return {zeros(int64_t(seqlen) * kHeadDim * 2), 0, kHeadDim, kHeadDim}; }
RowView rows(int seqlen) { return {zeros(int64_t(seqlen) * 4), 0, seqlen}; }

Problem problem(int seqlen) {
    Problem p{};
    p.type = ElementType::kBFloat16;
    p.batch_size = p.num_heads = p.num_heads_k = 1;
    p.head_dim = p.head_dim_v = kHeadDim;
    p.q = tensor(seqlen);
    p.k = tensor(seqlen);
    p.v = tensor(seqlen);
    p.seqlens.seqlen_q = p.seqlens.seqlen_k = seqlen;
    p.window = {kMaxSeqlen, kMaxSeqlen};
    p.chunks = make_chunks(0);
    p.score.softmax_scale = 0.125;
    round_scalars(p);
    return p;
}

void check(const char* error) {
    if (!error) return;
    std::fprintf(stderr, "%s\n", error);
    std::exit(1);
}

template <class Config> void report(const char* pass, int seqlen) {
    const sim::Counters& c = sim::counters;
    const int64_t bytes = c.cp_async.read + c.plain.read + c.plain.written + c.red.added;
    std::printf("{\"pass\": \"%s\", \"seqlen\": %d, \"block_m\": %d, \"block_n\": %d, \"bytes\": %lld}\n", pass, seqlen,
                Config::kBlockM, Config::kBlockN, static_cast<long long>(bytes));
    std::fflush(stdout);
}

template <class Config> void forward(int seqlen) {
    const FwdParams params{problem(seqlen), tensor(seqlen), rows(seqlen)};
    sim::counters = {};
    const auto kernel = fwd_sm80<Config, AttentionVariant<FullMask, PlainScore<float>>>;
    const int64_t blocks = query_grid(params.problem, Config::kBlockM).num_blocks();
    check(cuda::launch(kernel, blocks, Config::kThreads, Config::kSmemBytes, kDevice, params));
    report<Config>("forward", seqlen);
}

template <class Config> void backward(int seqlen) {
    const BwdParams pass{problem(seqlen), tensor(seqlen), tensor(seqlen), rows(seqlen), RowView{},
                         tensor(seqlen),  tensor(seqlen), tensor(seqlen), rows(seqlen), false};
    const int64_t tiles = num_query_tiles(pass.problem, Config::kBlockM);
    const DqAccum accum{static_cast<float*>(zeros(tiles * Config::kDqTileElements * 4)),
                        static_cast<int32_t*>(zeros(tiles * 4)), tiles};
    const BwdKernelParams params{pass, accum};
    const int64_t query_blocks = query_grid(pass.problem, Config::kBlockM).num_blocks();
    const int64_t key_blocks = key_grid(pass.problem, Config::kBlockN).num_blocks();
    const auto main_kernel = bwd_sm80<Config, AttentionVariant<FullMask, PlainScore<float>>>;
    sim::counters = {};
    check(cuda::launch(bwd_preprocess<Config>, query_blocks, Config::kPreprocessThreads,
                       sizeof(typename Config::PreprocessSmem), kDevice, params));
    check(cuda::launch(main_kernel, key_blocks, Config::kThreads, Config::kSmemBytes, kDevice, params));
    check(cuda::launch(bwd_postprocess<Config>, query_blocks, Config::kThreads, 0, kDevice, params));
    report<Config>("backward", seqlen);
}

// Square tiles, a warp for every 16 queries.
template <int kSize> using SquareTiles = FwdConfigSm80<
    bf16,
    FwdShapeSm80{.head_dim = kHeadDim, .block_m = kSize, .block_n = kSize, .warps = kSize / 16, .large_smem = true}>;

}  // namespace

int main() {
    for (const int seqlen : {100, 128, 256, 512, 1024}) {
        forward<FwdConfigSm80<bf16, fwd_shape_sm80(kHeadDim, true)>>(seqlen);
        backward<BwdConfigSm80<bf16, bwd_shape_sm80(kHeadDim, true, false)>>(seqlen);
    }
    forward<SquareTiles<32>>(1024);
    forward<SquareTiles<64>>(1024);
    forward<SquareTiles<128>>(1024);
    forward<SquareTiles<256>>(1024);
}
