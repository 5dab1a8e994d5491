// Rung 4, tensor cores: a warp has 16 queries, and computes 16 x 64 scores and their product with V by mma
// instructions, 16 x 8 x 16 multiplications each. Scores, weights and output are register tiles, spread over the lanes
// of the warp; the online softmax goes by whole tiles of keys. FlashAttention-2, algorithm 1.
#include "cuda/attention/softmax.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/copy_sm80.h"
#include "cuda/tile/gemm_sm80.h"
#include "cuda/tile/store_rows.h"
#include "ladder.h"

namespace ladder {

constexpr int kWarps = 4, kThreads = kWarps * kWarpThreads, kWarpRows = kTile / kWarps;
using Tile = SmemTile<kTile, kHeadDim>;  // its rows are permuted so that ldmatrix meets no bank twice

FA_DEVICE void load(Tile tile, const bf16* rows) {  // cp.async: straight to shared memory, past the registers
    load_tile<kThreads>(tile, StridedRows<bf16>{rows, kHeadDim}, kTile, kHeadDim);
}

FA_KERNEL(kThreads, 1) tensor_cores(Attention a) {
    const Tile sQ{ptx::smem()}, sK{sQ.end()}, sV{sK.end()};
    const int m0 = ptx::block_idx() * kTile, warp_row0 = warp_id() * kWarpRows;
    AccTile<kWarpRows, kHeadDim> acc_o;
    acc_o.clear();
    OnlineSoftmax<acc_o.kLaneRows> softmax;  // a lane has parts of two rows; four lanes share a row

    load(sQ, a.q + m0 * kHeadDim);
    for (int n0 = 0; n0 < a.seqlen; n0 += kTile) {
        load(sK, a.k + n0 * kHeadDim);
        load(sV, a.v + n0 * kHeadDim);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        ptx::sync_threads();  // the tiles are there, every thread's part of them

        AccTile<kWarpRows, kTile> acc_s;
        acc_s.clear();
        mma_abt<bf16>(acc_s, sQ, warp_row0, sK, 0);  // S = Q K^T
        apply_mask(acc_s, a.mask, QueryRows{m0 + warp_row0, n0});
        softmax.update_max(acc_s, kScaleLog2);
        softmax.rescale(acc_o);
        softmax.exp_and_sum(acc_s, kScaleLog2);
        // An accumulator has the layout of the next product's A operand: weights need not leave their registers.
        mma_ab<bf16>(acc_o, PackedTile<bf16, kWarpRows, kTile>(acc_s), sV, 0);  // O += P V
        ptx::sync_threads();  // everybody is done with K and V, which the next tiles overwrite
    }
    float lse[acc_o.kLaneRows];
    softmax.finish(acc_o, 1.f, -ptx::infinity(), lse);
    store_rows(acc_o, a.out + (m0 + warp_row0) * kHeadDim, kHeadDim, kWarpRows, kHeadDim);
}

}  // namespace ladder

int main(int argc, char** argv) {
    return ladder::run(
        argc, argv, "4 tensor cores", ladder::tensor_cores,
        {.block_queries = ladder::kTile, .threads = ladder::kThreads, .smem_bytes = 3 * ladder::Tile::kBytes});
}
