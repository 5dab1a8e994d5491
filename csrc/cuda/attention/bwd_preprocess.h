// First kernel of the backward pass: dsoftmax_sum = rowsum(dout * out) - dlse, zeroes the dQ accumulator, and writes
// the row statistics that the main kernel needs. One block per query tile.
#pragma once
#include "cuda/attention/dq_accum.h"
#include "cuda/attention/rows.h"
#include "cuda/attention/softmax_bwd.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/grid.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/gemm_sm80.h"
#include "cuda/tile/gemm_sm90.h"
#include "cuda/tile/smem_plan.h"

namespace flash_attn {

// Parameters of the kernels of a backward pass.
struct BwdKernelParams {
    BwdParams pass;
    DqAccum accum;
};

// Zeroes the tile's accumulator and its semaphores.
template <class Config> FA_DEVICE void clear_dq_tile(const DqAccum& accum, int head, int64_t tile) {
    const uint32_t zero[4] = {};
    float* const sums = dq_sums<Config>(accum, head, tile);
    for (int i = ptx::thread_idx() * 4; i < Config::kDqTileElements; i += Config::kPreprocessThreads * 4)
        ptx::store_16(sums + i, zero);
    if (ptx::thread_idx() < Config::kDqTurns)
        ptx::store(dq_turns<Config>(accum, head, tile) + ptx::thread_idx(), int32_t(0));
}

// Calls f(row, sum) once per row of the tiles: the diagonal of dout * out^T, computed with the same instructions as dP
// = dout V^T in the main kernel. For a query that sees a single key, out is that row of V, and dP - dsoftmax_sum must
// be exactly zero.
template <class Config, class F>
FA_DEVICE void for_each_row_product(typename Config::TileOut dout, typename Config::TileOut out, F f) {
    using Element = typename Config::Element;
    if constexpr (Config::kDpByWgmma) {
        const int row0 = warpgroup_id() * kWarpgroupRows, warp_row0 = warp_id() % 4 * 16;
        // The warpgroup's rows of a single-panel tile form a tile.
        static_assert(Config::kBlockM == kWarpgroupRows || Config::TileOut::kPanels == 1);
        const WideTile<kWarpgroupRows, Config::kHeadDim> columns{dout.base + dout.row_offset(row0)};
        AccTile<16, kWarpgroupRows> products;
        wgmma_abt<Element, Config::kHeadDim>(products, out, row0, columns, 0);
        ptx::wgmma_wait<0>();
        pin_tile(products);
        products.for_each([&](int r, int column, float& sum) {
            if (warp_row0 + lane_row(r) == column) f(row0 + column, sum);
        });
    } else {
        const int warp_row0 = warp_id() * 16;
        AccTile<16, 16> products;
        products.clear();
        mma_abt<Element>(products, dout, warp_row0, out, warp_row0);
        products.for_each([&](int r, int column, float& sum) {
            if (lane_row(r) == column) f(warp_row0 + column, sum);
        });
    }
}

template <class Config> FA_KERNEL(Config::kPreprocessThreads, 1)
bwd_preprocess(FA_GRID_CONSTANT BwdKernelParams params) {
    if constexpr (Config::kOverlap) ptx::grid_launch_dependents();
    using Element = typename Config::Element;
    constexpr int M = Config::kBlockM, kThreads = Config::kPreprocessThreads;
    const BwdParams& pass = params.pass;
    const Problem& p = pass.problem;
    const auto [m, head, batch] = query_grid(p, M).at(ptx::block_idx());
    const Sequence seq = sequence_at(p, batch);
    const int m0 = m * M;
    if (m0 >= seq.seqlen_q) return;

    const int64_t tile = first_query_tile(p, M, batch, seq.first_row_q) + m;
    clear_dq_tile<Config>(params.accum, head, tile);
    using Smem = typename Config::PreprocessSmem;
    const ptx::SmemPtr smem = ptx::smem();
    const typename Config::TileOut sOut{smem + offsetof(Smem, out)}, sDout{smem + offsetof(Smem, dout)};
    const int64_t row0 = seq.first_row_q + m0;
    const int valid_rows = seq.seqlen_q - m0;
    load_tile<kThreads>(sOut, rows_from<Element>(pass.out, batch, head, row0), valid_rows, p.head_dim_v);
    load_tile<kThreads>(sDout, rows_from<Element>(pass.dout, batch, head, row0), valid_rows, p.head_dim_v);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    if constexpr (Config::kDpByWgmma) ptx::fence_proxy_async();  // dout and out are read by wgmma
    ptx::sync_threads();  // dout and out have landed: every thread's copies are visible

    const float* const lse = row_of(pass.softmax_lse, batch, head, row0);
    for_each_row_product<Config>(sDout, sOut, [&](int row, float sum) {
        const bool is_query = row < valid_rows;
        const float row_lse = is_query ? ptx::load(lse + row) : ptx::infinity();
        // Rows without visible keys: LSE is -infinity (this package) or +infinity (flash_attn 2.8.3).
        const bool empty = fabsf(row_lse) == ptx::infinity();
        const float dlse = is_query && pass.dlse.data ? ptx::load(row_of(pass.dlse, batch, head, row0) + row) : 0.f;
        const float dsoftmax_sum = empty ? 0.f : sum - dlse;
        if (is_query) ptx::store(row_of(pass.dsoftmax_sum, batch, head, row0) + row, dsoftmax_sum);
        if constexpr (Config::kPadsRows) {
            const int64_t padded = dq_rows<Config>(params.accum, head, tile) + row;
            ptx::store(params.accum.lse_log2 + padded, lse_log2_of(row_lse));
            ptx::store(params.accum.dsoftmax_sum + padded, dsoftmax_sum);
        }
    });
}

}  // namespace flash_attn
