// Rung 3, tiles in shared memory: the 64 queries of a block need the same keys and values, so the block loads them
// once, 64 keys at a time. Each thread copies one row of K and one of V; between two barriers all threads read all.
#include "cuda/ptx/shared.h"
#include "cuda/ptx/sync.h"
#include "ladder.h"

namespace ladder {

FA_DEVICE void copy_to_shared(ptx::SmemPtr to, const bf16* row) {
#pragma unroll
    for (int i = 0; i < kHeadDim; i += 8) {
        uint32_t eight[4];
        ptx::load_16(eight, row + i);
        ptx::store_shared_16(to + i * int(sizeof(bf16)), eight);
    }
}
FA_DEVICE void load_shared_row(float (&x)[kHeadDim], ptx::SmemPtr row) {
#pragma unroll
    for (int i = 0; i < kHeadDim; i += 8) {
        uint32_t eight[4];
        ptx::load_shared_16(eight, row + i * int(sizeof(bf16)));
        unpack_eight(x + i, eight);
    }
}

FA_KERNEL(kTile, 1) shared_tiles(Attention a) {
    const ptx::SmemPtr sK = ptx::smem(), sV = sK + kTileBytes;
    const int thread = ptx::thread_idx(), query = ptx::block_idx() * kTile + thread;
    float q[kHeadDim], row[kHeadDim];
    load_row(q, a.q + query * kHeadDim);

    float row_max = -ptx::infinity(), row_sum = 0.f;
    float out[kHeadDim] = {};
    for (int n0 = 0; n0 < a.seqlen; n0 += kTile) {
        copy_to_shared(sK + thread * kRowBytes, a.k + (n0 + thread) * kHeadDim);
        copy_to_shared(sV + thread * kRowBytes, a.v + (n0 + thread) * kHeadDim);
        ptx::sync_threads();  // the tiles are there
        for (int j = 0; j < kTile; ++j) {
            load_shared_row(row, sK + j * kRowBytes);
            const float score = a.mask.keep(query, n0 + j) ? dot(q, row) * kScaleLog2 : -ptx::infinity();
            const float new_max = fmaxf(row_max, score);
            const float rescale_factor = ptx::exp2(row_max - new_max), weight = ptx::exp2(score - new_max);
            row_max = new_max;
            row_sum = row_sum * rescale_factor + weight;
            load_shared_row(row, sV + j * kRowBytes);
            for (int i = 0; i < kHeadDim; ++i) out[i] = out[i] * rescale_factor + weight * row[i];
        }
        ptx::sync_threads();  // everybody is done with the tiles, which the next ones overwrite
    }
    store_row(a.out + query * kHeadDim, out, ptx::reciprocal(row_sum));
}

}  // namespace ladder

int main(int argc, char** argv) {
    return ladder::run(
        argc, argv, "3 shared tiles", ladder::shared_tiles,
        {.block_queries = ladder::kTile, .threads = ladder::kTile, .smem_bytes = 2 * ladder::kTileBytes});
}
