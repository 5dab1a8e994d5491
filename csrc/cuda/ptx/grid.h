// sm_90. Programmatic dependent launch: a kernel that overlaps with the previous kernel of its stream (launch_pdl of
// cuda/launch.h). PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// The next kernel may start once every block of this one has called this or exited.
FA_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the previous kernel has completed and its writes are visible. Returns at once if this kernel was not
// launched with overlap. If no block of a kernel calls this, kernels after it may start before the previous kernel has
// completed.
FA_DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace flash_attn::ptx
