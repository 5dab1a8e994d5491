// Rung 1, naive: attention as it is defined. A thread has one query and computes its whole row of scores, in three
// passes: scores and their maximum, weights and their sum, the weighted sum of values. Scores and weights are a
// seqlen x seqlen matrix in global memory. FlashAttention, algorithm 0.
#include "ladder.h"

namespace ladder {

FA_KERNEL(64, 1) naive(Attention a) {
    const int query = ptx::block_idx() * 64 + ptx::thread_idx();
    float* const scores = a.scores + query * a.seqlen;  // [seqlen], of this query
    float q[kHeadDim], row[kHeadDim];
    load_row(q, a.q + query * kHeadDim);

    float row_max = -ptx::infinity();
    for (int key = 0; key < a.seqlen; ++key) {
        load_row(row, a.k + key * kHeadDim);
        const float score = a.mask.keep(query, key) ? dot(q, row) * kScaleLog2 : -ptx::infinity();
        row_max = fmaxf(row_max, score);
        ptx::store(scores + key, score);
    }
    // softmax(x) = exp(x - max) / sum(exp(x - max)): without the maximum, exp overflows for scores above 88.
    float row_sum = 0.f;
    for (int key = 0; key < a.seqlen; ++key) {
        const float weight = ptx::exp2(ptx::load(scores + key) - row_max);
        row_sum += weight;
        ptx::store(scores + key, weight);
    }
    float out[kHeadDim] = {};
    for (int key = 0; key < a.seqlen; ++key) {
        const float weight = ptx::load(scores + key);
        load_row(row, a.v + key * kHeadDim);
        for (int i = 0; i < kHeadDim; ++i) out[i] += weight * row[i];
    }
    store_row(a.out + query * kHeadDim, out, ptx::reciprocal(row_sum));
}

}  // namespace ladder

int main(int argc, char** argv) {
    return ladder::run(argc, argv, "1 naive", ladder::naive, {.block_queries = 64, .threads = 64, .smem_bytes = 0});
}
