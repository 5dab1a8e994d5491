// Runs the passes of a case on the simulator, with the memory that the torch ops would give them. The report fails
// where they touch anything else.
#pragma once
#include <vector>
#include "runner/case.h"
#include "runner/compare.h"
#include "runner/inputs.h"
#include "runner/simulator.h"

namespace flash_attn::runner {

struct Forward {
    Compact out, softmax_lse;
    Traffic traffic;
    bool hopper;              // by the kernels for compute capability 9.0
    Compact max_logits = {};  // [sequences, heads, 1], if asked for
};
struct Backward {
    Compact dq, dk, dv, dsoftmax_sum;
    Traffic traffic;
    bool hopper;
};

struct Probs {
    std::vector<float> weights;  // [batch_size, num_heads, seqlen_q, seqlen_k]; dropped ones have their sign bit set
    Traffic traffic;
};

Forward run_forward(const Inputs& x, Schedule schedule, Report& report);

// out and softmax_lse are what the forward pass gave, dlse is taken if the case says so.
Backward run_backward(const Inputs& x, const Compact& out, const Compact& softmax_lse, Schedule schedule,
                      Report& report);

Probs run_attn_probs(const Inputs& x, const Compact& softmax_lse, Schedule schedule, Report& report);

}  // namespace flash_attn::runner
