// Typed pointers into the workspace, for kernels.
#pragma once
#include "cuda/attention/dq_accum.h"
#include "cuda/attention/workspace.h"

namespace flash_attn::cuda {

inline DqAccum place_workspace(void* workspace, const Problem& p, const WorkspaceShape& shape) {
    char* const bytes = static_cast<char*>(workspace);
    const WorkspaceOffsets at(p, shape);
    const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(bytes + offset); };
    return {floats(0), reinterpret_cast<int32_t*>(bytes + at.turns), num_query_tiles(p, shape.block_m),
            shape.pads_rows ? floats(at.lse_log2) : nullptr, shape.pads_rows ? floats(at.dsoftmax_sum) : nullptr};
}

}  // namespace flash_attn::cuda
