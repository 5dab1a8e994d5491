// The summaries of key ranges (policy/range_mask.h), one block at a time.
#pragma once
#include "policy/range_mask.h"

namespace flash_attn::cpu {

inline QueryBlock query_block(const RangeMask& mask, int block) {
    const int begin = block * kRangeBlock, end = min(begin + kRangeBlock, mask.window.seqlen_q);
    QueryBlock sum = mask.summary_of(begin);
    for (int row = begin + 1; row < end; ++row) sum = RangeMask::join(sum, mask.summary_of(row));
    return sum;
}

// Needs the query blocks: those that cannot see the keys are skipped as a whole.
inline KeyBlock key_block(const RangeMask& mask, int block) {
    const int seqlen_q = mask.window.seqlen_q, key = block * kRangeBlock;
    const auto may_see = [&](int row) { return mask.sees({row, row + 1}, {key, key + kRangeBlock}); };
    int first = 0, end = seqlen_q;
    while (first < end && !(may_see(first) && mask.sees_block(first, block)))
        first = may_see(first) ? first + 1 : round_down(first, kRangeBlock) + kRangeBlock;
    while (first < end && !(may_see(end - 1) && mask.sees_block(end - 1, block)))
        end = may_see(end - 1) ? end - 1 : round_down(end - 1, kRangeBlock);
    return {first, end};
}

}  // namespace flash_attn::cpu
