// Rung 5, double buffering: while the warps work on one tile of keys, cp.async brings the next one into a second
// buffer. The barrier that says that a tile is there also says that everybody is done with the tile before: one is
// enough.
#include "cuda/attention/softmax.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/copy_sm80.h"
#include "cuda/tile/gemm_sm80.h"
#include "cuda/tile/store_rows.h"
#include "ladder.h"

namespace ladder {

constexpr int kWarps = 4, kThreads = kWarps * kWarpThreads, kWarpRows = kTile / kWarps;
using Tile = SmemTile<kTile, kHeadDim>;

FA_DEVICE void load(Tile tile, const bf16* rows) {
    load_tile<kThreads>(tile, StridedRows<bf16>{rows, kHeadDim}, kTile, kHeadDim);
}

FA_KERNEL(kThreads, 1) double_buffering(Attention a) {
    const Tile sQ{ptx::smem()}, buffers{sQ.end()};  // two buffers, of a tile of K and one of V each
    const auto sK = [&](int n) { return Tile{buffers.base + n % 2 * 2 * Tile::kBytes}; };
    const auto sV = [&](int n) { return Tile{sK(n).end()}; };
    const auto load_keys = [&](int n) {
        load(sK(n), a.k + n * kTile * kHeadDim);
        load(sV(n), a.v + n * kTile * kHeadDim);
        ptx::cp_async_commit();
    };
    const int m0 = ptx::block_idx() * kTile, warp_row0 = warp_id() * kWarpRows;
    AccTile<kWarpRows, kHeadDim> acc_o;
    acc_o.clear();
    OnlineSoftmax<acc_o.kLaneRows> softmax;

    const int tiles = a.seqlen / kTile;
    load(sQ, a.q + m0 * kHeadDim);
    load_keys(0);
    for (int n = 0; n < tiles; ++n) {
        ptx::cp_async_wait<0>();
        ptx::sync_threads();  // tile n is there; everybody is done with tile n - 1, which tile n + 1 overwrites
        if (n + 1 < tiles) load_keys(n + 1);

        AccTile<kWarpRows, kTile> acc_s;
        acc_s.clear();
        mma_abt<bf16>(acc_s, sQ, warp_row0, sK(n), 0);  // S = Q K^T
        apply_mask(acc_s, a.mask, QueryRows{m0 + warp_row0, n * kTile});
        softmax.update_max(acc_s, kScaleLog2);
        softmax.rescale(acc_o);
        softmax.exp_and_sum(acc_s, kScaleLog2);
        mma_ab<bf16>(acc_o, PackedTile<bf16, kWarpRows, kTile>(acc_s), sV(n), 0);  // O += P V
    }
    float lse[acc_o.kLaneRows];
    softmax.finish(acc_o, 1.f, -ptx::infinity(), lse);
    store_rows(acc_o, a.out + (m0 + warp_row0) * kHeadDim, kHeadDim, kWarpRows, kHeadDim);
}

}  // namespace ladder

int main(int argc, char** argv) {
    return ladder::run(
        argc, argv, "5 double buffering", ladder::double_buffering,
        {.block_queries = ladder::kTile, .threads = ladder::kThreads, .smem_bytes = 5 * ladder::Tile::kBytes});
}
