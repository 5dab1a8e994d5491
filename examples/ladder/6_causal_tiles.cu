// Rung 6, tiles that the mask hides: of a causal mask half of the tiles hold no score that counts. The mask says which
// keys a tile of queries can see at all (kv_range), and whether a tile needs to be compared with the diagonal
// (is_full_block). FlashAttention-2, section 3.1.1.
#include "cuda/attention/softmax.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/copy_sm80.h"
#include "cuda/tile/gemm_sm80.h"
#include "cuda/tile/store_rows.h"
#include "ladder.h"
#include "policy/tile_order.h"

namespace ladder {

constexpr int kWarps = 4, kThreads = kWarps * kWarpThreads, kWarpRows = kTile / kWarps;
using Tile = SmemTile<kTile, kHeadDim>;

FA_DEVICE void load(Tile tile, const bf16* rows) {
    load_tile<kThreads>(tile, StridedRows<bf16>{rows, kHeadDim}, kTile, kHeadDim);
}

FA_KERNEL(kThreads, 1) causal_tiles(Attention a) {
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

    const Range queries{m0, m0 + kTile}, tiles = tiles_of(a.mask.kv_range(queries), kTile);
    load(sQ, a.q + m0 * kHeadDim);
    load_keys(tiles.begin);
    for (int n = tiles.begin; n < tiles.end; ++n) {
        ptx::cp_async_wait<0>();
        ptx::sync_threads();  // tile n is there; everybody is done with tile n - 1, which tile n + 1 overwrites
        if (n + 1 < tiles.end) load_keys(n + 1);

        AccTile<kWarpRows, kTile> acc_s;
        acc_s.clear();
        mma_abt<bf16>(acc_s, sQ, warp_row0, sK(n), 0);  // S = Q K^T
        const Range keys{n * kTile, (n + 1) * kTile};
        if (!a.mask.is_full_block(queries, keys)) apply_mask(acc_s, a.mask, QueryRows{m0 + warp_row0, keys.begin});
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
        argc, argv, "6 causal tiles", ladder::causal_tiles,
        {.block_queries = ladder::kTile, .threads = ladder::kThreads, .smem_bytes = 5 * ladder::Tile::kBytes});
}
