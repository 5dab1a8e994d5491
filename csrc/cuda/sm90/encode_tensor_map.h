// Encodes tensor maps through the driver API. Does not link libcuda: the package must load on machines without it.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <array>
#include <cstdint>
#include <cstdio>

namespace flash_attn::cuda {

inline decltype(&cuTensorMapEncodeTiled) find_encode_tiled() {
    constexpr unsigned kSince = 12000;  // CUDA version of the driver API in use
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
}

// The error text, with all arguments of the call: the driver gives no reason. Valid until the thread's next error.
inline const char* refusal(const char* name, CUresult result, const void* base, const std::array<int64_t, 4>& sizes,
                           const std::array<int64_t, 3>& stride_bytes, const std::array<int, 4>& box) {
    thread_local char text[336];
    const auto n = [](int64_t x) { return static_cast<long long>(x); };
    std::snprintf(text, sizeof text,
                  "the CUDA driver refuses a tensor map of %s: CUresult %d, address %p, sizes %lld %lld %lld %lld, "
                  "strides in bytes %lld %lld %lld, box %d %d %d %d",
                  name, static_cast<int>(result), base, n(sizes[0]), n(sizes[1]), n(sizes[2]), n(sizes[3]),
                  n(stride_bytes[0]), n(stride_bytes[1]), n(stride_bytes[2]), box[0], box[1], box[2], box[3]);
    return text;
}

// Encodes a map of 16-bit elements with the 128-byte swizzle and zero fill. sizes and box are in elements, contiguous
// dimension first; stride_bytes are those of the other dimensions. Returns null or an error text with the tensor's
// name.
inline const char* encode_tensor_map(const char* name, CUtensorMap& map, void* base, std::array<int64_t, 4> sizes,
                                     std::array<int64_t, 3> stride_bytes, std::array<int, 4> box) {
    static const auto encode = find_encode_tiled();
    if (!encode) return "the CUDA driver is too old: it has no cuTensorMapEncodeTiled, which came with CUDA 12.0";
    constexpr int kRank = 4;
    cuuint64_t size[kRank], stride[kRank - 1];
    cuuint32_t box_size[kRank], element_stride[kRank];
    for (int i = 0; i < kRank; ++i) {
        size[i] = static_cast<cuuint64_t>(sizes[i]);
        box_size[i] = static_cast<cuuint32_t>(box[i]);
        element_stride[i] = 1;
        if (i) stride[i - 1] = static_cast<cuuint64_t>(stride_bytes[i - 1]);
    }
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, base, size, stride, box_size,
                                   element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : refusal(name, result, base, sizes, stride_bytes, box);
}

}  // namespace flash_attn::cuda
