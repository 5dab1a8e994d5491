// Results of the passes against a reference of the same case.
#pragma once
#include "runner/compare.h"
#include "runner/reference.h"
#include "runner/run.h"

namespace flash_attn::runner {

void compare_forward(const Case& c, const Forward& got, const Yardstick& y, Report& report);

// forward: what the backward pass was given.
void compare_backward(const Inputs& x, const Forward& forward, const Backward& got, const Yardstick& y, Report& report);

}  // namespace flash_attn::runner
