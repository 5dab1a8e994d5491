// Tensors in memory of exactly their size: an access past the end meets an inaccessible page, or AddressSanitizer.
// Elements start as kUntouched: a NaN if it is read, and a mark of what was never written.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#include "problem.h"
#include "runner/case.h"

namespace flash_attn::runner {

// `bytes` of memory at a multiple of 16, and nothing behind them, up to the next multiple. Enormous ones are reserved,
// not filled.
class Memory {
public:
    explicit Memory(int64_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return data_; }
    bool is_filled() const { return bytes_ <= kFilledBytes; }

private:
    static constexpr int64_t kFilledBytes = int64_t(1) << 30;
    int64_t bytes_;
    bool from_malloc_;
    void* mapped_ = nullptr;
    size_t mapped_bytes_ = 0;
    char* data_;
};

// Kernels read tensors whose rows start at multiples of 16 bytes, and write tensors of any alignment.
enum class Access { kRead, kWritten };

struct Shape { int batch, rows, heads, head_dim; };

// [batch, rows, heads, head_dim] of 16-bit elements or, for results only, of fp32 numbers; packed tensors have a batch
// of one, pages count as batch.
class Tensor {
public:
    Tensor(Shape shape, Layout layout, Access access, bool in_floats = false);

    uint16_t& at(int batch, int row, int head, int i) const { return words()[offset(batch, row, head) + i]; }
    // An element as a number: of the given type, unless elements are fp32.
    double number(ElementType type, int batch, int row, int head, int i) const;
    bool is_untouched(int batch, int row, int head, int i) const;
    TensorView view(bool packed) const;
    const Shape& shape() const { return shape_; }
    // Whether everything but the elements, between rows for example, is untouched.
    bool gaps_untouched() const;

private:
    char* data() const { return memory_->data() + start_ * bytes_; }
    uint16_t* words() const { return reinterpret_cast<uint16_t*>(data()); }
    int64_t offset(int batch, int row, int head) const {
        return batch * batch_stride_ + row * row_stride_ + head * head_stride_;
    }
    void set_strides(Layout layout, Access access);

    Shape shape_;
    int bytes_;          // of an element
    int64_t start_ = 0;  // the first element within the memory
    int64_t batch_stride_ = 0, row_stride_ = 0, head_stride_ = 0, size_ = 0;
    std::unique_ptr<Memory> memory_;
};

// One fp32 number per query and head: [batch, heads, rows]; packed ones have a batch of one.
class RowTensor {
public:
    RowTensor(int batch, int heads, int rows, Layout layout);

    float& at(int batch, int head, int row) const { return data()[batch * batch_stride_ + head * head_stride_ + row]; }
    RowView view(bool packed) const { return {data(), packed ? 0 : batch_stride_, head_stride_}; }
    bool is_untouched(int batch, int head, int row) const;
    bool gaps_untouched() const;

private:
    float* data() const { return reinterpret_cast<float*>(memory_->data()) + start_; }

    int batch_, heads_, rows_;
    int64_t start_ = 0, batch_stride_ = 0, head_stride_ = 0, size_ = 0;
    std::unique_ptr<Memory> memory_;
};

// Numbers that kernels read as they are: lengths, tables, slopes. Null if there are none and none were asked for.
template <class T> class Numbers {
public:
    Numbers() = default;
    explicit Numbers(const std::vector<T>& values)
        : memory_(std::make_unique<Memory>(int64_t(sizeof(T) * values.size()))) {
        for (size_t i = 0; i < values.size(); ++i) data()[i] = values[i];
    }
    T* data() const { return memory_ ? reinterpret_cast<T*>(memory_->data()) : nullptr; }

private:
    std::unique_ptr<Memory> memory_;
};

}  // namespace flash_attn::runner
