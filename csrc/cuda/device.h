// The GPU that a call is for, as plain data. Without headers of the C++ library: every kernel file includes this, and
// they would be most of what the compiler reads.
#pragma once
#include <cstdint>

namespace flash_attn::cuda {

struct Device {
    int compute_capability;  // 80 for 8.0
    int smem_per_block;      // maximum shared memory per block, in bytes
    int multiprocessors;
    int64_t l2_bytes;  // size of the L2 cache
    void* stream;
    const char* backend = nullptr;  // FLASH_ATTN_BACKEND: the only backend allowed to run; null: the best one that can
};

}  // namespace flash_attn::cuda
