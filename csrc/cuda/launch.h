// Kernel launches: the only file that launches. The simulator has its own launch.h.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdlib>
#include "cuda/device.h"

namespace flash_attn::cuda {

// The text of an error. Also clears the runtime's last error, which the next launch of any library would report
// otherwise.
inline const char* take_error(cudaError_t error) {
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// FLASH_ATTN_PDL=0, read at the first launch, disables programmatic dependent launch: every kernel then starts after
// the previous kernel of the stream has ended. For debugging.
inline bool pdl_is_allowed() {
    static const bool is_allowed = [] {
        const char* const value = std::getenv("FLASH_ATTN_PDL");
        return !value || value[0] != '0';
    }();
    return is_allowed;
}

// overlaps: launch with programmatic stream serialization, so that blocks may start before the previous kernel of the
// stream has ended; the kernel must call ptx::grid_wait() before it reads that kernel's results (cuda/ptx/grid.h).
template <class... Params, class... Args> const char* launch_kernel(bool overlaps, void (*kernel)(Params...),
                                                                    int64_t blocks, int threads, int smem_bytes,
                                                                    const Device& device, const Args&... args) {
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "the problem has more than 2^31 - 1 tiles";
    // More than 48 KB of dynamic shared memory requires opt-in.
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

// Both return null or an error text; blocks = 0 launches nothing. launch_pdl: programmatic dependent launch (PDL).
template <class... Params, class... Args> const char* launch(void (*kernel)(Params...), int64_t blocks, int threads,
                                                             int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(false, kernel, blocks, threads, smem_bytes, device, args...);
}
template <class... Params, class... Args> const char* launch_pdl(void (*kernel)(Params...), int64_t blocks, int threads,
                                                                 int smem_bytes, const Device& device, Args... args) {
    return launch_kernel(true, kernel, blocks, threads, smem_bytes, device, args...);
}

// Zeroes memory, in stream order.
inline const char* clear(void* memory, size_t bytes, const Device& device) {
    const cudaError_t cleared = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(device.stream));
    return cleared == cudaSuccess ? nullptr : take_error(cleared);
}

}  // namespace flash_attn::cuda
