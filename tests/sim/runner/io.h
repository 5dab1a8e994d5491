// How many bytes kernels must move: integer formulas of tile sizes, lengths, heads and head_dims, written down
// independently of the kernels. What every line counts is said beside it.
#pragma once
#include "runner/inputs.h"
#include "runner/simulator.h"

namespace flash_attn::runner {

Traffic forward_traffic(const Inputs& x);
Traffic backward_traffic(const Inputs& x);
Traffic probs_traffic(const Inputs& x);

}  // namespace flash_attn::runner
