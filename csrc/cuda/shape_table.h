// Tables of tile shapes: arrays of rows, more specific rows last.
#pragma once
#include <cstddef>

namespace flash_attn {

// The last row that fits. A compile error if none does, in constant evaluation.
template <class Shape, size_t kRows, class Fits>
constexpr const Shape& last_row(const Shape (&table)[kRows], Fits fits) {
    for (size_t i = kRows; i > 0; --i)
        if (fits(table[i - 1])) return table[i - 1];
    __builtin_trap();
}

}  // namespace flash_attn
