// How many bytes kernels must move: integer formulas of tile sizes, lengths, heads and head_dims, written down
// independently of the kernels. What every line counts is said beside it.
#pragma once
#include "runner/inputs.h"
#include "runner/simulator.h"

namespace flash_attn::runner {

// hopper: by the kernels for compute capability 9.0.
Traffic forward_traffic(const Inputs& x, bool hopper);
Traffic backward_traffic(const Inputs& x, bool hopper);
Traffic probs_traffic(const Inputs& x);

}  // namespace flash_attn::runner
