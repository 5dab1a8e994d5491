// The CUDA kernels as torch code and tests see them. Torch-free: memory and the stream come from the caller.
//
// Elements are bf16 or fp16. What kernels read (q, k, v, out and dout of the backward pass) must have rows that start
// at multiples of 16 bytes; what they write may lie anywhere. Rows outside of sequences are not written.
#pragma once
#include <string>
#include <vector>
#include "problem.h"

namespace flash_attn::cuda {

constexpr int kMaxHeadDim = 256;

struct Device {
    int compute_capability;  // 80 for 8.0
    int smem_per_block;      // bytes of shared memory that one block may ask for
    int multiprocessors;
    int64_t l2_bytes;  // of its level-2 cache
    void* stream;
    const char* backend = nullptr;  // the only one that may run, by FLASH_ATTN_BACKEND; null: the best that can
};

// These return null, or what went wrong, which is valid until the thread's next call. workspace: 256-byte aligned, not
// initialised, free for other use once the pass has run.
const char* run_fwd(const FwdParams& params, void* workspace, const Device& device);
const char* run_bwd(const BwdParams& params, void* workspace, const Device& device);
const char* run_attn_probs(const ProbsParams& params, const Device& device);

int64_t fwd_workspace_bytes(const FwdParams& params, const Device& device);
int64_t bwd_workspace_bytes(const BwdParams& params, const Device& device);

struct BackendInfo {
    const char* name;
    const char* code;  // what its kernels are compiled into, such as "sm_80 compute_80"; empty: not in this build
};
std::vector<BackendInfo> backends();  // best first

// Which backend runs a problem, and why no better one does.
struct Refusal {
    const char* backend;
    std::string reason;
};
struct Explanation {
    const char* backend;  // null: none can
    std::vector<Refusal> better;
};
Explanation explain(const FwdParams& params, const Device& device);
Explanation explain(const BwdParams& params, const Device& device);
Explanation explain(const ProbsParams& params, const Device& device);

}  // namespace flash_attn::cuda
