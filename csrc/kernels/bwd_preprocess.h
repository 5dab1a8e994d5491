// Before the backward pass: dsoftmax_sum = rowsum(dout * out) - dlse, and a cleared workspace for dQ. One block per
// tile of queries.
#pragma once
#include "attn/dq_accum.h"
#include "attn/rows.h"
#include "kernels/bwd_config_sm80.h"
#include "ptx/global.h"
#include "ptx/math.h"
#include "ptx/sync.h"
#include "tile/gemm_sm80.h"

namespace flash_attn {

// What the kernels of a backward pass are given.
struct BwdKernelParams {
    BwdParams pass;
    DqAccum accum;
};

// The tile's sums and its counter become zero.
template <class Config> FA_DEVICE void clear_dq_tile(const DqAccum& accum, int head, int64_t tile) {
    const uint32_t zero[4] = {};
    float* const sums = accum.sums + (head * accum.num_tiles + tile) * Config::kDqTileElements;
    for (int i = ptx::thread_idx() * 4; i < Config::kDqTileElements; i += Config::kPreprocessThreads * 4)
        ptx::store_16(sums + i, zero);
    if (ptx::thread_idx() == 0) ptx::store(dq_turn(accum, head, tile), int32_t(0));
}

template <class Config> FA_KERNEL(Config::kPreprocessThreads, 1)
bwd_preprocess(FA_GRID_CONSTANT BwdKernelParams params) {
    using Element = typename Config::Element;
    constexpr int M = Config::kBlockM, kThreads = Config::kPreprocessThreads;
    const BwdParams& pass = params.pass;
    const Problem& p = pass.problem;
    const auto [m, head, batch] = query_grid(p, M).at(ptx::block_idx());
    const Sequence seq = sequence_at(p.seqlens, p.paged_kv, batch);
    const int m0 = m * M;
    if (m0 >= seq.seqlen_q) return;

    clear_dq_tile<Config>(params.accum, head, first_dq_tile(p, M, batch, seq.first_row_q) + m);
    const typename Config::TileQ sOut{ptx::smem()}, sDout{sOut.end()};
    const int64_t row0 = seq.first_row_q + m0;
    const int valid_rows = seq.seqlen_q - m0, warp_row0 = warp_id() * 16;
    load_tile<kThreads>(sOut, rows_from<Element>(pass.out, batch, head, row0), valid_rows, p.head_dim_v);
    load_tile<kThreads>(sDout, rows_from<Element>(pass.dout, batch, head, row0), valid_rows, p.head_dim_v);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // both have landed, for every thread's part

    // The diagonal of dout * out^T, by the very instructions that make dP = dout * V^T: for a query that sees one key,
    // out is that row of V, and dP - dsoftmax_sum must be exactly zero.
    AccTile<16, 16> products;
    products.clear();
    mma_abt<Element>(products, sDout, warp_row0, sOut, warp_row0);
    const float* const lse = row_of(pass.softmax_lse, batch, head, row0);
    products.for_each([&](int r, int column, float& sum) {
        const int row = warp_row0 + lane_row(r);
        if (lane_row(r) != column || row >= valid_rows) return;
        // Rows that see no key have a log-sum-exp of -infinity, or +infinity, as others write it.
        const bool empty = fabsf(ptx::load(lse + row)) == ptx::infinity();
        const float dlse = pass.dlse.data ? ptx::load(row_of(pass.dlse, batch, head, row0) + row) : 0.f;
        ptx::store(row_of(pass.dsoftmax_sum, batch, head, row0) + row, empty ? 0.f : sum - dlse);
    });
}

}  // namespace flash_attn
