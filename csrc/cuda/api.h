// The interface of the CUDA kernels to the torch code and the tests. No torch: the caller provides memory and stream.
//
// Elements are bf16 or fp16; those of partial results (Problem::float_results) are fp32. Tensors that kernels read (q,
// k, v, and out and dout in backward) need 16-byte aligned rows; output tensors need no alignment. Rows outside
// sequences are not written.
#pragma once
#include <string>
#include <vector>
#include "cuda/device.h"
#include "problem.h"

namespace flash_attn::cuda {

constexpr int kMaxHeadDim = 256;

// Return null, or an error text that is valid until the thread's next call. workspace: 256-byte aligned, uninitialised,
// and free for other use in stream order after the pass.
const char* run_fwd(const FwdParams& params, void* workspace, const Device& device);
const char* run_bwd(const BwdParams& params, void* workspace, const Device& device);
const char* run_attn_probs(const ProbsParams& params, void* workspace, const Device& device);

int64_t fwd_workspace_bytes(const FwdParams& params, const Device& device);
int64_t bwd_workspace_bytes(const BwdParams& params, const Device& device);
int64_t attn_probs_workspace_bytes(const ProbsParams& params, const Device& device);

struct BackendInfo {
    const char* name;
    const char* code;  // targets of its kernels, such as "sm_80 compute_80"; empty: not in this build
};
std::vector<BackendInfo> backends();  // best first

// The backend that runs a problem, and why no better one does.
struct Refusal {
    const char* backend;
    std::string reason;
};
struct Explanation {
    const char* backend;  // null: no backend can run it
    std::vector<Refusal> better;
};
Explanation explain(const FwdParams& params, const Device& device);
Explanation explain(const BwdParams& params, const Device& device);
Explanation explain(const ProbsParams& params, const Device& device);

}  // namespace flash_attn::cuda
