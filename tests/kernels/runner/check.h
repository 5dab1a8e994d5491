// What is checked of a case; `check=` in its line says which.
#pragma once
#include <vector>
#include "runner/case.h"
#include "runner/compare.h"
#include "runner/simulator.h"

namespace flash_attn::runner {

struct Plan {
    std::vector<Schedule> schedules;
    bool forward = true, backward = true, attn_probs = true;
};

void check_case(const Case& c, const Plan& plan, Report& report);

// "reference": results against the reference; the same bits under every schedule; bytes moved against a formula.
// "large" is the same with numbers that are near the largest of fp16.
void check_reference(const Case& c, const Plan& plan, Report& report);
// "batch": a sequence gives the same bits alone as among others.
void check_batch(const Case& c, const Plan& plan, Report& report);
// "invalid_lengths": invalid lengths and tables give any result, but touch nothing outside of the tensors.
void check_invalid_lengths(const Case& c, const Plan& plan, Report& report);
// "nonfinite": a NaN or infinity reaches what attends to it, and everything else has the bits of a clean run.
void check_nonfinite(const Case& c, const Plan& plan, Report& report);
// "hidden": the same for a few places in V of every head and sequence, many tiles of which have to do with one.
void check_hidden(const Case& c, const Plan& plan, Report& report);
// "marked": rows whose softmax_lse is infinite have gradients of zero and add none to keys, regardless of the mask.
void check_marked(const Case& c, const Plan& plan, Report& report);
// "shards": queries and keys in shards, which know their places, give the attention of the whole when put together.
void check_shards(const Case& c, const Plan& plan, Report& report);

}  // namespace flash_attn::runner
