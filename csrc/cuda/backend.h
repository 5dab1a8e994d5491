// A backend: the kernels of one architecture, which problems they can run, and what memory they need for that.
#pragma once
#include <string>
#include "cuda/api.h"

// What the build compiles the kernels of a folder into; it leaves them out where it does not say.
#ifndef FLASH_ATTN_BACKEND_CODE
#define FLASH_ATTN_BACKEND_CODE ""
#endif

namespace flash_attn::cuda {

template <class Params> struct Pass {
    std::string (*why_not)(const Params& params, const Device& device);  // the reason, empty if it can
    int64_t (*workspace_bytes)(const Params& params, const Device& device);
    const char* (*run)(const Params& params, void* workspace, const Device& device);  // null: it has no such kernels
};

struct Backend {
    const char* name;
    const char* code;  // as in BackendInfo
    Pass<FwdParams> fwd;
    Pass<BwdParams> bwd;
    Pass<ProbsParams> attn_probs;
};

// Of the folder of an architecture: backend<80>() is defined by cuda/sm80/backend.cpp.
template <int kArch> const Backend& backend();

template <class Params> int64_t no_workspace(const Params&, const Device&) { return 0; }

// "8.0" for 80.
inline std::string version_of(int compute_capability) {
    return std::to_string(compute_capability / 10) + '.' + std::to_string(compute_capability % 10);
}

}  // namespace flash_attn::cuda
