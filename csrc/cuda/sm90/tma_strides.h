// Which tensors TMA can access, and their strides in a tensor map: cuda/tile/copy_sm90.h explains the dimensions.
#pragma once
#include <cstdint>
#include <numeric>
#include <string>
#include "problem.h"

namespace flash_attn::cuda {

struct TensorSize {
    int64_t batch, heads, rows;  // packed: batch = 1
    int columns;
};

// Strides of a tensor for TMA. Requirements: rows do not overlap; base, strides and row ends are multiples of 16 bytes;
// the number of steps fits in 31 bits. Row ends, because TMA stores whole 16-byte chunks, which would overwrite memory
// next to the tensor.
class TmaStrides {
public:
    TmaStrides(const TensorView& view, const TensorSize& size)
        : base_(reinterpret_cast<intptr_t>(view.data)), used_(size.columns * kElementBytes),
          batch_(size.batch > 1 ? view.batch_stride * kElementBytes : 0),
          head_(size.heads > 1 ? view.head_stride * kElementBytes : 0),
          row_(size.rows > 1 ? view.row_stride * kElementBytes : used_), step_(std::gcd(std::gcd(batch_, head_), row_)),
          span_((size.batch - 1) * batch_ + (size.heads - 1) * head_ + size.rows * row_),
          is_empty_(!view.data || size.rows == 0 || used_ == 0) {}

    bool fit() const {
        return !is_empty_ && used_ <= row_ && row_ < kWrapBytes && is_aligned(base_) && is_aligned(used_) &&
               is_aligned(step_) && span_ / step_ <= kMaxSteps;
    }
    // The reason, for a tensor that does not fit.
    std::string why_not() const {
        const auto bytes = [](int64_t n) { return std::to_string(n) + " bytes"; };
        if (is_empty_) return "it is empty";
        if (used_ > row_) return "rows of " + bytes(used_) + " overlap, " + bytes(row_) + " apart";
        if (!is_aligned(base_)) return "it does not start at a multiple of 16 bytes";
        if (!is_aligned(used_)) return "rows of " + bytes(used_) + " do not end at a multiple of 16";
        if (!is_aligned(row_)) return "rows " + bytes(row_) + " apart do not start at multiples of 16";
        if (!is_aligned(head_)) return "heads " + bytes(head_) + " apart do not start at multiples of 16";
        if (!is_aligned(batch_)) return "sequences " + bytes(batch_) + " apart do not start at multiples of 16";
        if (row_ >= kWrapBytes) return "rows are " + bytes(row_) + " apart, which is too far";
        return "it is too large: " + bytes(span_) + " in steps of " + bytes(step_);
    }
    int64_t row_bytes() const { return row_; }
    int64_t wrap_bytes() const { return kWrapBytes - row_; }
    int64_t step_bytes() const { return step_; }
    int32_t batch_steps() const { return static_cast<int32_t>(batch_ / step_); }
    int32_t head_steps() const { return static_cast<int32_t>(head_ / step_); }
    int32_t row_steps() const { return static_cast<int32_t>(row_ / step_); }

    static constexpr int64_t kElementBytes = 2, kMaxSteps = INT32_MAX;

private:
    static constexpr int64_t kAlignment = 16, kWrapBytes = int64_t(1) << 34;
    static bool is_aligned(int64_t bytes) { return bytes % kAlignment == 0; }

    int64_t base_, used_, batch_, head_, row_, step_, span_;  // bytes
    bool is_empty_;
};

}  // namespace flash_attn::cuda
