// The interface of a backend, the kernels of one architecture: which problems it can run, its workspace and its passes.
#pragma once
#include <string>
#include "cuda/api.h"

// The targets that the build compiles an architecture's kernels for; undefined if the build leaves them out.
#ifndef FLASH_ATTN_BACKEND_CODE
#define FLASH_ATTN_BACKEND_CODE ""
#endif

namespace flash_attn::cuda {

template <class Params> struct Pass {
    std::string (*why_not)(const Params& params, const Device& device);  // why it cannot run it; empty if it can
    int64_t (*workspace_bytes)(const Params& params, const Device& device);
    const char* (*run)(const Params& params, void* workspace, const Device& device);  // null if it has no such kernels
};

struct Backend {
    const char* name;
    const char* code;  // see BackendInfo
    Pass<FwdParams> fwd;
    Pass<BwdParams> bwd;
    Pass<ProbsParams> attn_probs;
    // Fills the tables of key ranges (problem.h), in stream order; key_blocks null: not those of keys.
    const char* (*make_range_blocks)(const Problem& p, QueryBlock* query_blocks, KeyBlock* key_blocks,
                                     const Device& device);
};

// One backend per architecture folder: backend<80>() is defined in cuda/sm80/backend.cpp.
template <int kArch> const Backend& backend();

template <class Params> int64_t no_workspace(const Params&, const Device&) { return 0; }

// "8.0" for 80.
inline std::string version_of(int compute_capability) {
    return std::to_string(compute_capability / 10) + '.' + std::to_string(compute_capability % 10);
}

}  // namespace flash_attn::cuda
