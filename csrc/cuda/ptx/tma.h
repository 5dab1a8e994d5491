// sm_90. TMA: copies boxes of a tensor between global and shared memory, issued by one thread. coord[0] is the
// contiguous dimension. Out-of-bounds elements are loaded as zero and not stored. Stores join the bulk groups of
// bulk.h. PTX ISA, "Asynchronous copy: Tensor copy: cp.async.bulk.tensor".
#pragma once
#include <cuda.h>

#include "cuda/ptx/bulk.h"

namespace flash_attn::ptx {

using TensorMap = CUtensorMap;  // a kernel parameter: FA_GRID_CONSTANT ptx::TensorMap

// smem_dst is 128-byte aligned; 1024-byte aligned with the 128-byte swizzle.
template <int kRank>
FA_DEVICE void tma_load(SmemPtr smem_dst, const TensorMap& map, SmemPtr bar, const int (&coord)[kRank]) {
    static_assert(kRank >= 2 && kRank <= 5);
    const uint32_t dst = smem_dst.address, b = bar.address;
    if constexpr (kRank == 2)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
                "r"(dst),
            "l"(&map), "r"(b), "r"(coord[0]), "r"(coord[1])
            : "memory");
    if constexpr (kRank == 3)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
            "[%2];" ::"r"(dst),
            "l"(&map), "r"(b), "r"(coord[0]), "r"(coord[1]), "r"(coord[2])
            : "memory");
    if constexpr (kRank == 4)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
            "[%2];" ::"r"(dst),
            "l"(&map), "r"(b), "r"(coord[0]), "r"(coord[1]), "r"(coord[2]), "r"(coord[3])
            : "memory");
    if constexpr (kRank == 5)
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
            "l"(&map), "r"(b), "r"(coord[0]), "r"(coord[1]), "r"(coord[2]), "r"(coord[3]), "r"(coord[4])
            : "memory");
}

template <int kRank> FA_DEVICE void tma_store(const TensorMap& map, SmemPtr smem_src, const int (&coord)[kRank]) {
    static_assert(kRank >= 2 && kRank <= 5);
    const uint32_t src = smem_src.address;
    if constexpr (kRank == 2)
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                     "r"(src), "r"(coord[0]), "r"(coord[1])
                     : "memory");
    if constexpr (kRank == 3)
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                     "r"(src), "r"(coord[0]), "r"(coord[1]), "r"(coord[2])
                     : "memory");
    if constexpr (kRank == 4)
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                     "r"(src), "r"(coord[0]), "r"(coord[1]), "r"(coord[2]), "r"(coord[3])
                     : "memory");
    if constexpr (kRank == 5)
        asm volatile(
            "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
            "r"(src), "r"(coord[0]), "r"(coord[1]), "r"(coord[2]), "r"(coord[3]), "r"(coord[4])
            : "memory");
}

// Prefetches the box into the L2 cache only. PTX ISA, "cp.async.bulk.prefetch.tensor".
FA_DEVICE void tma_prefetch(const TensorMap& map, const int (&coord)[4]) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(coord[0]),
                 "r"(coord[1]), "r"(coord[2]), "r"(coord[3])
                 : "memory");
}

}  // namespace flash_attn::ptx
