// Offset of a row of K or V, for contiguous or paged KV.
#pragma once
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

// Returns elements from the start of the tensor. row is relative to the tensor (packed), the batch entry (dense) or the
// first page (paged). A page index outside the pool gives -1: such a row is loaded as zeros and masked.
FA_HOST_DEVICE int64_t kv_row_offset(const TensorView& t, const PagedKv& paged, int batch, int64_t row) {
    if (!paged.block_table) return batch * t.batch_stride + row * t.row_stride;
    const int32_t page = paged.block_table[batch * paged.batch_stride + row / paged.page_size];
    if (page < 0 || page >= paged.num_pages) return -1;
    return page * t.batch_stride + row % paged.page_size * t.row_stride;
}

}  // namespace flash_attn
