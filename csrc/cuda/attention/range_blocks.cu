// Launches the kernels that summarise key ranges, before those of the pass.
#include "cuda/attention/range_blocks.h"
#include "cuda/instance.h"
#include "cuda/launch.h"

namespace flash_attn::cuda {

const char* make_range_blocks(const Problem& p, QueryBlock* query_blocks, KeyBlock* key_blocks, const Device& device) {
    const RangeBlockParams params{p, query_blocks, key_blocks};
    const auto blocks = [&](int per_sequence) {
        return ceil_div(int64_t(p.batch_size) * per_sequence, int64_t(kRangeWarps));
    };
    const char* error =
        launch(make_query_blocks, blocks(RangeMask::num_query_blocks(p)), kRangeThreads, 0, device, params);
    if (!error && key_blocks)
        error = launch(make_key_blocks, blocks(RangeMask::num_key_blocks(p)), kRangeThreads, 0, device, params);
    return error;
}

}  // namespace flash_attn::cuda
