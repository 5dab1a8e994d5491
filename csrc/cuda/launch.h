// Launching a kernel: the only place that does. The simulator has a launch.h of its own.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include "cuda/api.h"

namespace flash_attn::cuda {

// The text of an error, which is cleared in the CUDA runtime: otherwise the next launch, of any library, would report
// it.
inline const char* take_error(cudaError_t error) {
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// FLASH_ATTN_PDL=0, read at the first launch, turns programmatic dependent launch off: every kernel then begins after
// the end of the one before it in the stream. For debugging.
inline bool pdl_is_allowed() {
    static const bool is_allowed = [] {
        const char* const value = std::getenv("FLASH_ATTN_PDL");
        return !value || value[0] != '0';
    }();
    return is_allowed;
}

// overlaps: launched with programmatic stream serialization, so that its blocks may start before the kernel before it
// in the stream has ended; it must call ptx::grid_wait() before it reads what that wrote (cuda/ptx/grid.h).
template <class... Params, class... Args> const char* launch_kernel(bool overlaps, void (*kernel)(Params...),
                                                                    int64_t blocks, int threads, int smem_bytes,
                                                                    const Device& device, const Args&... args) {
    if (blocks == 0) return nullptr;
    if (blocks > std::numeric_limits<int32_t>::max()) return "the problem has more than 2^31 - 1 tiles";
    // More than 48 KB of dynamic shared memory is opt-in.
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
                                    overlaps && pdl_is_allowed() ? 1u : 0u};
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args...);
    return launched == cudaSuccess ? nullptr : take_error(launched);
}

// Both return null or an error text; no blocks is no error. launch_pdl: programmatic dependent launch (PDL).
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
