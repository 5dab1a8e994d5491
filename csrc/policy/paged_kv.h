// The offset of a row of keys or values, contiguous or in pages.
#pragma once
#include "policy/host_device.h"
#include "problem.h"

namespace flash_attn {

// In elements, from the start of the tensor; row counts from the first row of the tensor (packed), of the batch entry
// (dense) or of the first page. A page outside the pool gives -1: such a row is read as zeros and not attended to.
FA_HOST_DEVICE int64_t kv_row_offset(const TensorView& t, const PagedKv& paged, int batch, int64_t row) {
    if (!paged.block_table) return batch * t.batch_stride + row * t.row_stride;
    const int32_t page = paged.block_table[batch * paged.batch_stride + row / paged.page_size];
    if (page < 0 || page >= paged.num_pages) return -1;
    return page * t.batch_stride + row % paged.page_size * t.row_stride;
}

}  // namespace flash_attn
