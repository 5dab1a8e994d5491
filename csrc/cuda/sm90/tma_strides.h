// Which tensors TMA can see, and with which strides: cuda/tile/copy_sm90.h explains the dimensions.
#pragma once
#include <cstdint>
#include <numeric>
#include "problem.h"

namespace flash_attn::cuda {

struct TensorSize {
    int64_t batch, heads, rows;  // packed: a batch of one
    int columns;
};

// Strides of a tensor for TMA. Not every tensor has them: rows must lie apart, everything must start at multiples of 16
// bytes, and steps must be countable in 31 bits. Rows must end at such a multiple, too: TMA stores whole pieces of 16
// bytes, and would overwrite what lies beside the tensor.
class TmaStrides {
public:
    TmaStrides(const TensorView& view, const TensorSize& size)
        : batch_(size.batch > 1 ? view.batch_stride * kElementBytes : 0),
          head_(size.heads > 1 ? view.head_stride * kElementBytes : 0),
          row_(size.rows > 1 ? view.row_stride * kElementBytes : size.columns * kElementBytes),
          step_(std::gcd(std::gcd(batch_, head_), row_)) {
        const auto is_aligned = [](int64_t x) { return x % kAlignment == 0; };
        const int64_t base = reinterpret_cast<intptr_t>(view.data);
        const int64_t used = size.columns * kElementBytes;
        fit_ = view.data && size.rows > 0 && used > 0 && used <= row_ && row_ < kWrapBytes && is_aligned(base) &&
               is_aligned(used) && is_aligned(step_);
        if (fit_) fit_ = ((size.batch - 1) * batch_ + (size.heads - 1) * head_ + size.rows * row_) / step_ <= kMaxSteps;
    }
    bool fit() const { return fit_; }
    int64_t row_bytes() const { return row_; }
    int64_t wrap_bytes() const { return kWrapBytes - row_; }
    int64_t step_bytes() const { return step_; }
    int32_t batch_steps() const { return static_cast<int32_t>(batch_ / step_); }
    int32_t head_steps() const { return static_cast<int32_t>(head_ / step_); }
    int32_t row_steps() const { return static_cast<int32_t>(row_ / step_); }

    static constexpr int64_t kElementBytes = 2, kMaxSteps = INT32_MAX;

private:
    static constexpr int64_t kAlignment = 16, kWrapBytes = int64_t(1) << 34;
    int64_t batch_, head_, row_, step_;  // bytes
    bool fit_;
};

}  // namespace flash_attn::cuda
