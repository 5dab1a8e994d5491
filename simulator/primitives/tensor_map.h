// Tensor maps for the tests of the primitives.
#pragma once
#include "cuda/ptx/tma.h"
#include "primitives.h"

namespace flash_attn::primitives {

// bf16, swizzled over 128 bytes. dim and box are in elements, innermost first; stride_bytes[i] is of dimension i + 1.
template <int kRank> ptx::TensorMap make_tensor_map(void* base, const int64_t (&dim)[kRank],
                                                    const int64_t (&stride_bytes)[kRank - 1], const int (&box)[kRank]) {
#ifdef __CUDACC__
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    require(status == cudaSuccess && encode, "the driver has no cuTensorMapEncodeTiled");
    cuuint64_t dims[kRank], strides[kRank - 1];
    cuuint32_t boxes[kRank], ones[kRank];
    for (int i = 0; i < kRank; ++i) {
        dims[i] = static_cast<cuuint64_t>(dim[i]);
        boxes[i] = static_cast<cuuint32_t>(box[i]);
        ones[i] = 1;
        if (i) strides[i - 1] = static_cast<cuuint64_t>(stride_bytes[i - 1]);
    }
    CUtensorMap map;
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, base, dims, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled");
    return map;
#else
    ptx::TensorMap map{base, kRank, 2, {}, {}, {}, 128};
    for (int i = 0; i < kRank; ++i) {
        map.dim[i] = dim[i];
        map.box[i] = box[i];
        if (i) map.stride_bytes[i] = stride_bytes[i - 1];
    }
    return map;
#endif
}

}  // namespace flash_attn::primitives
