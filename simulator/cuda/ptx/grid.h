// Host model of csrc/cuda/ptx/grid.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

FA_DEVICE void grid_launch_dependents() {}  // any kernel may begin early here
FA_DEVICE void grid_wait() { sim::grid_wait(); }

}  // namespace flash_attn::ptx
