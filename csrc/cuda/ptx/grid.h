// sm_90. Kernels that follow one another in a stream, the second launched to overlap with the first (launch_pdl
// of cuda/launch.h). PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol".
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// The kernel after this one may begin once every block has called this or ended.
FA_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernel before this one has ended and all that it wrote is visible. Returns at once in a kernel that
// was not launched to overlap. If no block calls this, what comes after this kernel may come before the end of the
// kernel before it.
FA_DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace flash_attn::ptx
