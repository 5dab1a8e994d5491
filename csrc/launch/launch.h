// Launching a kernel.
#pragma once
#include <cuda_runtime_api.h>
#include <cstdint>
#include <limits>
#include "kernels.h"

namespace flash_attn::cuda {

// Returns null, or what went wrong. No blocks: nothing to do.
template <class... Params, class... Args> const char* launch(void (*kernel)(Params...), int64_t blocks, int threads,
                                                             int smem_bytes, const Device& device, Args... args) {
    if (blocks == 0) return nullptr;
    if (blocks > std::numeric_limits<int32_t>::max()) return "the problem has more than 2^31 - 1 tiles";
    // Up to 48 KB need no permission.
    if (smem_bytes > 48 * 1024) {
        const cudaError_t allowed = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, smem_bytes, static_cast<cudaStream_t>(device.stream)>>>(args...);
    const cudaError_t launched = cudaGetLastError();
    return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace flash_attn::cuda
