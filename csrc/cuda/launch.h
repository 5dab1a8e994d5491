// Launching a kernel.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include "cuda/api.h"

namespace flash_attn::cuda {

// Says what went wrong. CUDA then forgets it, or the next kernel of somebody else would be blamed.
inline const char* take_error(cudaError_t error) {
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// FLASH_ATTN_PDL=0, at the first launch: every kernel begins after the end of the one before it. For whoever looks
// for the cause of a wrong gradient.
inline bool overlap_is_allowed() {
    static const bool is_allowed = [] {
        const char* const value = std::getenv("FLASH_ATTN_PDL");
        return !value || value[0] != '0';
    }();
    return is_allowed;
}

// overlaps: may begin before the kernel before it in the stream has ended (cuda/ptx/grid.h).
template <class... Params, class... Args> const char* launch_kernel(bool overlaps, void (*kernel)(Params...),
                                                                    int64_t blocks, int threads, int smem_bytes,
                                                                    const Device& device, const Args&... args) {
    if (blocks == 0) return nullptr;
    if (blocks > std::numeric_limits<int32_t>::max()) return "the problem has more than 2^31 - 1 tiles";
    // Up to 48 KB need no permission.
    if (smem_bytes > 48 * 1024) {
        const cudaError_t allowed = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        if (allowed != cudaSuccess) return take_error(allowed);
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config{dim3(static_cast<unsigned>(blocks)),
                                    dim3(static_cast<unsigned>(threads)),
                                    static_cast<size_t>(smem_bytes),
                                    static_cast<cudaStream_t>(device.stream),
                                    &overlap,
                                    overlaps && overlap_is_allowed() ? 1u : 0u};
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args...);
    return launched == cudaSuccess ? nullptr : take_error(launched);
}

// Return null, or what went wrong. No blocks: nothing to do.
template <class... Params, class... Args> const char* launch(void (*kernel)(Params...), int64_t blocks, int threads,
                                                             int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(false, kernel, blocks, threads, smem_bytes, device, args...);
}
template <class... Params, class... Args> const char* launch_pdl(void (*kernel)(Params...), int64_t blocks, int threads,
                                                                 int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(true, kernel, blocks, threads, smem_bytes, device, args...);
}

// Zeros, after what was launched before and before what is launched next.
inline const char* clear(void* memory, size_t bytes, const Device& device) {
    const cudaError_t cleared = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(device.stream));
    return cleared == cudaSuccess ? nullptr : take_error(cleared);
}

}  // namespace flash_attn::cuda
