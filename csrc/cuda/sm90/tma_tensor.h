// Builds TmaTensor on the host (cuda/tile/copy_sm90.h).
#pragma once
#include "cuda/sm90/encode_tensor_map.h"
#include "cuda/sm90/tma_strides.h"
#include "cuda/tile/copy_sm90.h"

namespace flash_attn::cuda {

// Boxes of box_rows rows and 64 columns. Requires a tensor that fits. Returns null or an error text with its name.
inline const char* make_tma_tensor(const char* name, TmaTensor& t, const TensorView& view, const TensorSize& size,
                                   int box_rows) {
    const TmaStrides strides(view, size);
    t.batch_steps = strides.batch_steps(), t.head_steps = strides.head_steps(), t.row_steps = strides.row_steps();
    return encode_tensor_map(name, t.map, view.data,
                             {size.columns, kTmaRows, int64_t(kTmaWrap) + 1, TmaStrides::kMaxSteps + 1},
                             {strides.row_bytes(), strides.wrap_bytes(), strides.step_bytes()}, {64, box_rows, 1, 1});
}

}  // namespace flash_attn::cuda
