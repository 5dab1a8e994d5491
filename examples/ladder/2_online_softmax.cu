// Rung 2, online softmax: one pass over the keys, and no matrix of scores. The maximum, the sum and the output are
// those of the keys so far; when a greater score comes, what was summed up before is scaled down to the new maximum.
// Milakov and Gimelshein (2018), algorithm 3.
#include "ladder.h"

namespace ladder {

FA_KERNEL(64, 1) online_softmax(Attention a) {
    const int query = ptx::block_idx() * 64 + ptx::thread_idx();
    float q[kHeadDim], row[kHeadDim];
    load_row(q, a.q + query * kHeadDim);

    float row_max = -ptx::infinity(), row_sum = 0.f;
    float out[kHeadDim] = {};
    for (int key = 0; key < a.seqlen; ++key) {
        load_row(row, a.k + key * kHeadDim);
        const float score = a.mask.keep(query, key) ? dot(q, row) * kScaleLog2 : -ptx::infinity();

        // Every query sees key 0, so that new_max is a number from there on: infinity - infinity does not come up.
        const float new_max = fmaxf(row_max, score);
        const float rescale_factor = ptx::exp2(row_max - new_max), weight = ptx::exp2(score - new_max);
        row_max = new_max;
        row_sum = row_sum * rescale_factor + weight;

        load_row(row, a.v + key * kHeadDim);
        for (int i = 0; i < kHeadDim; ++i) out[i] = out[i] * rescale_factor + weight * row[i];
    }
    store_row(a.out + query * kHeadDim, out, ptx::reciprocal(row_sum));
}

}  // namespace ladder

int main(int argc, char** argv) {
    return ladder::run(argc, argv, "2 online softmax", ladder::online_softmax,
                       {.block_queries = 64, .threads = 64, .smem_bytes = 0});
}
