// Splitting the keys of one sequence: chunks of keys are attended to in parallel, and their partial results are merged
// in order (Dao et al., "Flash-Decoding for long-context inference", 2023).
#pragma once
#include "policy/host_device.h"

namespace flash_attn {

constexpr int kSplitAlignment = 32;  // chunks start at multiples of a dropout block
constexpr int kMaxChunks = 64;       // unless the caller asks for more
constexpr int kMaxSplits = 128;      // the most that a caller may ask for

// Keys per chunk. It depends on one sequence's own keys and rows only, so results are the same in every batch, for
// every capacity and page size. The partial result of a chunk is a few percent of the keys and values that it reads.
// num_splits: the most chunks that the caller wants; 0: no wish.
FA_HOST_DEVICE int keys_per_chunk(int num_keys, int num_rows, int num_splits) {
    if (num_splits > 0) return max(round_up(ceil_div(num_keys, num_splits), kSplitAlignment), kSplitAlignment);
    const int enough = num_keys < 4096 ? 256 : 512;  // shorter chunks for more tasks where there are few keys
    return max(max(enough, 2 * num_rows), round_up(ceil_div(num_keys, kMaxChunks), 128));
}

}  // namespace flash_attn
