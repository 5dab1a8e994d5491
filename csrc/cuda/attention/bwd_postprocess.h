// Last kernel of the backward pass: converts dQ from the fp32 workspace, scaled, to the type of results. One block per
// query tile, with the threads that held this tile's dQ in the main kernel.
#pragma once
#include "cuda/attention/bwd_preprocess.h"
#include "cuda/attention/dq_accum.h"
#include "cuda/attention/rows.h"
#include "cuda/ptx/grid.h"
#include "cuda/tile/store_rows.h"

namespace flash_attn {

// Loads kCount contiguous sums, scaled.
template <int kCount> FA_DEVICE void load_sums(float* x, const float* sums, float scale) {
    static_assert(kCount == 1 || kCount == 4);
    if constexpr (kCount == 1) {
        *x = ptx::load(sums) * scale;
    } else {
        uint32_t bits[4];
        ptx::load_16(bits, sums);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = ptx::bits_float(bits[i]) * scale;
    }
}

template <class Config> FA_KERNEL(Config::kPostprocessThreads, 1)
bwd_postprocess(FA_GRID_CONSTANT BwdKernelParams params) {
    if constexpr (Config::kOverlap) ptx::grid_wait();  // the main kernel has written the sums
    using Element = typename Config::Element;
    using GridDq = typename Config::GridDq;
    constexpr int M = Config::kBlockM;
    const BwdParams& pass = params.pass;
    const Problem& p = pass.problem;
    const auto [m, head, batch] = query_grid(p, M).at(ptx::block_idx());
    const Sequence seq = sequence_at(p, batch);
    const int row0 = m * M + GridDq::row0();
    if (m * M >= seq.seqlen_q) return;

    const int64_t tile = first_query_tile(p, M, batch, seq.first_row_q) + m;
    const float* const sums = dq_sums<Config>(params.accum, head, tile) + Config::dq_thread();
    const float scale = p.scalars.scale;
#pragma unroll
    for (int part = 0; part < Config::kDqParts; ++part) {
        typename GridDq::Acc dq;
#pragma unroll
        for (int i = 0; i < dq.kRowBlocks; ++i)
#pragma unroll
            for (int j = 0; j < dq.kPerBlock; j += Config::kDqVector)
                load_sums<Config::kDqVector>(&dq.x[i][j], sums + Config::dq_element(part, i, j), scale);
        const int col0 = Config::dq_col0(part);
        with_result_row<Element>(p, pass.dq, batch, head, seq.first_row_q + row0, [&](auto* rows) {
            store_rows_by_eights(dq, rows + col0, pass.dq.row_stride, seq.seqlen_q - row0, p.head_dim - col0);
        });
    }
}

}  // namespace flash_attn
