// csrc/ops/cuda_targets.h as C functions, for test_cuda_build.py.
#include <cstring>

#include "ops/cuda_targets.h"

extern "C" {

bool runs_on(const char* target, int compute_capability) { return flash_attn::runs_on(target, compute_capability); }

void unavailable_reason(const char* device, int compute_capability, const char* targets, char* text, size_t size) {
    std::strncpy(text, flash_attn::unavailable_reason(device, compute_capability, targets).c_str(), size - 1);
    text[size - 1] = '\0';
}

}  // extern "C"
