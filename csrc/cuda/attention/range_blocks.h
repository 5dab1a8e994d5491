// Makes the summaries of key ranges (policy/range_mask.h): one warp per block of queries or keys.
#pragma once
#include "cuda/ptx/global.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/lane.h"
#include "policy/range_mask.h"
#include "policy/seqlen.h"

namespace flash_attn {

struct RangeBlockParams {
    Problem problem;
    QueryBlock* query_blocks;  // where those of problem.key_ranges lie
    KeyBlock* key_blocks;
};

constexpr int kRangeWarps = 4, kRangeThreads = kRangeWarps * kWarpThreads;

FA_DEVICE int xor_lane(int x, int mask) {
    return static_cast<int>(ptx::float_bits(ptx::shfl_xor(ptx::bits_float(static_cast<uint32_t>(x)), mask)));
}

// Calls f(mask, block, index) with this warp's block, of num_blocks in each sequence, and its place in the table.
template <class F> FA_DEVICE void with_range_block(const Problem& p, int num_blocks, F f) {
    const int index = ptx::block_idx() * kRangeWarps + warp_id(), batch = index / num_blocks;
    if (batch < p.batch_size) f(RangeMask::of(p, sequence_at(p, batch), batch, 0), index % num_blocks, index);
}

FA_KERNEL(kRangeThreads, 1) make_query_blocks(FA_GRID_CONSTANT RangeBlockParams params) {
    const Problem& p = params.problem;
    with_range_block(p, RangeMask::num_query_blocks(p), [&](const RangeMask& mask, int block, int index) {
        QueryBlock sum{kMaxSeqlen, 0, 0, kMaxSeqlen};
        const int first = block * kRangeBlock, end = min(first + kRangeBlock, mask.window.seqlen_q);
        for (int row = first + lane_id(); row < end; row += kWarpThreads)
            sum = RangeMask::join(sum, mask.summary_of(row));
#pragma unroll
        for (int lane = 1; lane < kWarpThreads; lane *= 2)
            sum = RangeMask::join(sum, {xor_lane(sum.any_begin, lane), xor_lane(sum.any_end, lane),
                                        xor_lane(sum.all_begin, lane), xor_lane(sum.all_end, lane)});
        if (lane_id() == 0)
            ptx::store_16(params.query_blocks + index,
                          {static_cast<uint32_t>(sum.any_begin), static_cast<uint32_t>(sum.any_end),
                           static_cast<uint32_t>(sum.all_begin), static_cast<uint32_t>(sum.all_end)});
    });
}

// From the query blocks. Queries are rounded outwards to multiples of kRangeTile: a tile of queries whose summary
// reaches some of the keys is among them as a whole, whatever a window leaves of them. Hence sees() is true of no tiles
// but those of q_range(): thread blocks that add to dQ in turns agree on whose turn it is.
FA_KERNEL(kRangeThreads, 1) make_key_blocks(FA_GRID_CONSTANT RangeBlockParams params) {
    const Problem& p = params.problem;
    with_range_block(p, RangeMask::num_key_blocks(p), [&](const RangeMask& mask, int block, int index) {
        const int key = block * kRangeBlock, seqlen_q = mask.window.seqlen_q;
        int first = kMaxSeqlen, end = 0;
        for (int row = lane_id() * kRangeTile; row < seqlen_q; row += kWarpThreads * kRangeTile) {
            if (!mask.sees({row, row + kRangeTile}, {key, key + kRangeBlock})) continue;
            first = min(first, row);
            end = row + kRangeTile;
        }
#pragma unroll
        for (int lane = 1; lane < kWarpThreads; lane *= 2) {
            first = min(first, xor_lane(first, lane));
            end = max(end, xor_lane(end, lane));
        }
        if (lane_id() == 0) ptx::store(params.key_blocks + index, KeyBlock{first, end});
    });
}

}  // namespace flash_attn
