#include "runner/tensors.h"
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include "policy/host_device.h"
#include "runner/elements.h"

extern "C" void __asan_init() __attribute__((weak));  // null without AddressSanitizer

namespace flash_attn::runner {
namespace {

constexpr int kAligned = 8, kAlignedBytes = 16;  // elements in 16 bytes

// Of one element of an array whose strides are at least this large, offsets do not fit in 32 bits.
constexpr int64_t kFarRow = int64_t(1) << 26, kFarHead = (int64_t(1) << 32) + kAligned, kFarBatch = int64_t(1) << 34;

void fill(const Memory& memory, int64_t count, uint16_t bits) {
    if (memory.is_filled()) std::fill_n(reinterpret_cast<uint16_t*>(memory.data()), count, bits);
}

}  // namespace

// AddressSanitizer watches malloc() on both sides. Without it, the page after the memory may not be touched.
Memory::Memory(int64_t bytes) : bytes_(bytes), from_malloc_(__asan_init && is_filled()) {
    if (from_malloc_) {
        data_ = static_cast<char*>(std::malloc(size_t(bytes)));
        return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE), used = round_up(bytes, page);
    mapped_bytes_ = size_t(used + page);
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED || mprotect(static_cast<char*>(mapped_) + used, size_t(page), PROT_NONE)) {
        std::perror("memory for a tensor");
        std::exit(2);
    }
    data_ = static_cast<char*>(mapped_) + used - round_up<int64_t>(bytes, kAlignedBytes);
}

Memory::~Memory() {
    if (from_malloc_) {
        std::free(data_);
    } else {
        munmap(mapped_, mapped_bytes_);
    }
}

Tensor::Tensor(Shape shape, Layout layout, Access access, bool in_floats) : shape_(shape), bytes_(in_floats ? 4 : 2) {
    set_strides(layout, access);
    const bool empty = shape.batch == 0 || shape.rows == 0 || shape.heads == 0;
    size_ = empty ? start_ : start_ + offset(shape.batch - 1, shape.rows - 1, shape.heads - 1) + shape.head_dim;
    const int words = bytes_ / 2;
    memory_ = std::make_unique<Memory>(bytes_ * size_);
    fill(*memory_, words * size_, kUntouched);
    if (memory_->is_filled() || empty) return;
    for (int b = 0; b < shape.batch; ++b)
        for (int r = 0; r < shape.rows; ++r)
            for (int h = 0; h < shape.heads; ++h)
                std::fill_n(this->words() + words * offset(b, r, h), words * shape.head_dim, kUntouched);
}

void Tensor::set_strides(Layout layout, Access access) {
    const bool read = access == Access::kRead;
    const int64_t row = read ? round_up(shape_.head_dim, kAligned) : shape_.head_dim;
    switch (layout) {
        case Layout::kRows:
            head_stride_ = row;
            row_stride_ = head_stride_ * shape_.heads;
            batch_stride_ = row_stride_ * shape_.rows;
            break;
        case Layout::kHeads:
            row_stride_ = row;
            head_stride_ = row_stride_ * shape_.rows;
            batch_stride_ = head_stride_ * shape_.heads;
            break;
        case Layout::kGaps:  // one head more per row, one row more per batch entry
            // Odd head_dims start at even places, so that they are stored in pairs, all but the last element.
            start_ = read ? kAligned : 1 + shape_.head_dim % 2;
            head_stride_ = row + (read ? kAligned : 1);
            row_stride_ = head_stride_ * (shape_.heads + 1);
            batch_stride_ = row_stride_ * (shape_.rows + 1);
            break;
        case Layout::kChunks:  // the same, all at multiples of 16 bytes, read or written
            start_ = kAligned;
            head_stride_ = round_up(shape_.head_dim, kAligned) + kAligned;
            row_stride_ = head_stride_ * (shape_.heads + 1);
            batch_stride_ = row_stride_ * (shape_.rows + 1);
            break;
        case Layout::kFar:
            row_stride_ = kFarRow, head_stride_ = kFarHead, batch_stride_ = kFarBatch;
            break;
    }
}

TensorView Tensor::view(bool packed) const { return {data(), packed ? 0 : batch_stride_, row_stride_, head_stride_}; }

double Tensor::number(ElementType type, int batch, int row, int head, int i) const {
    if (bytes_ == 2) return to_float(type, at(batch, row, head, i));
    float x;
    std::memcpy(&x, data() + bytes_ * (offset(batch, row, head) + i), sizeof x);
    return x;
}

bool Tensor::is_untouched(int batch, int row, int head, int i) const {
    const uint16_t* const word = words() + bytes_ / 2 * (offset(batch, row, head) + i);
    return word[0] == kUntouched && word[bytes_ / 2 - 1] == kUntouched;
}

bool Tensor::gaps_untouched() const {
    if (!memory_->is_filled()) return true;
    std::vector<bool> is_element(size_t(size_), false);
    for (int b = 0; b < shape_.batch; ++b)
        for (int r = 0; r < shape_.rows; ++r)
            for (int h = 0; h < shape_.heads; ++h)
                std::fill_n(is_element.begin() + start_ + offset(b, r, h), shape_.head_dim, true);
    const uint16_t* elements = reinterpret_cast<const uint16_t*>(memory_->data());
    const int words = bytes_ / 2;
    for (int64_t i = 0; i < words * size_; ++i)
        if (!is_element[size_t(i / words)] && elements[i] != kUntouched) return false;
    return true;
}

RowTensor::RowTensor(int batch, int heads, int rows, Layout layout) : batch_(batch), heads_(heads), rows_(rows) {
    const bool gaps = layout == Layout::kGaps || layout == Layout::kChunks, far = layout == Layout::kFar;
    start_ = gaps ? 1 : 0;
    head_stride_ = far ? kFarHead : rows + (gaps ? 3 : 0);
    batch_stride_ = far ? kFarBatch : heads * head_stride_ + (gaps ? 5 : 0);
    const bool empty = batch == 0 || heads == 0 || rows == 0;
    size_ = empty ? start_ : start_ + (batch - 1) * batch_stride_ + (heads - 1) * head_stride_ + rows;
    memory_ = std::make_unique<Memory>(4 * size_);
    fill(*memory_, 2 * size_, kUntouched);
    if (memory_->is_filled() || empty) return;
    for (int b = 0; b < batch; ++b)
        for (int h = 0; h < heads; ++h) std::fill_n(reinterpret_cast<uint32_t*>(&at(b, h, 0)), rows, kUntouchedRow);
}

bool RowTensor::is_untouched(int batch, int head, int row) const {
    uint32_t bits;
    std::memcpy(&bits, &at(batch, head, row), sizeof bits);
    return bits == kUntouchedRow;
}

bool RowTensor::gaps_untouched() const {
    if (!memory_->is_filled()) return true;
    std::vector<bool> is_element(size_t(size_), false);
    for (int b = 0; b < batch_; ++b)
        for (int h = 0; h < heads_; ++h)
            std::fill_n(is_element.begin() + start_ + b * batch_stride_ + h * head_stride_, rows_, true);
    const uint32_t* numbers = reinterpret_cast<const uint32_t*>(memory_->data());
    for (int64_t i = 0; i < size_; ++i)
        if (!is_element[size_t(i)] && numbers[i] != kUntouchedRow) return false;
    return true;
}

}  // namespace flash_attn::runner
