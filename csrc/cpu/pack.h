// Packs tiles of tensors into operands of products. Rows are given as pointers, so they may be anywhere; a null pointer
// is a row of zeros. For pair operands (Bf16Dot), depth counts pairs, and an odd last element is paired with 0.
#pragma once
#include "cpu/element.h"
#include "cpu/gemm.h"

namespace flash_attn::cpu::FA_ISA {

template <class E, class Dot> struct Pack {
    using Operand = typename Dot::Operand;
    using T = typename Dot::Accum;
    static constexpr int kDepth = Dot::kDepth, kBlock = 16;

    static constexpr int depth_of(int length) { return ceil_div(length, kDepth); }

    // Operand k along a row: one element or one pair.
    FA_INLINE Operand operand(const E* row, int k, int length) {
        if constexpr (kDepth == 1) {
            return to_compute(row[k]);
        } else {
            const uint32_t high = 2 * k + 1 < length ? row[2 * k + 1].bits : 0;
            return row[2 * k].bits | high << 16;
        }
    }

    // out[row][depth]: operand A of a product that sums along the rows.
    static void rows(const E* const* src, int num_rows, int length, Matrix<Operand> out) {
        const int depth = depth_of(length);
        for (int r = 0; r < num_rows; ++r) {
            Operand* o = out.data + r * out.stride;
            if (!src[r]) {
                memset(o, 0, sizeof(Operand) * depth);
            } else if constexpr (kDepth == 2) {
                o[depth - 1] = 0;
                memcpy(o, src[r], sizeof(E) * length);
            } else {
                for_each_vector<T>(length, [&](int k, int count) {
                    const Vec<T> x = load_some(src[r] + k, count);
                    count == kLanes<T> ? store(o + k, x) : memcpy_lanes(o + k, x, count);
                });
            }
        }
    }

    // out[depth][row]: operand B of a product that sums along the rows, zero-padded to padded_rows.
    static __attribute__((noinline)) void transposed(const E* const* src, int num_rows, int padded_rows, int length,
                                                     Matrix<Operand> out) {
        const int depth = depth_of(length);
        for (int r0 = 0; r0 < num_rows; r0 += kBlock) {
            const int rows_here = min(kBlock, num_rows - r0);
            for (int k0 = 0; k0 < depth; k0 += kBlock) transpose_block(src + r0, rows_here, length, k0, out, r0);
        }
        for (int k = 0; k < depth; ++k)
            for (int r = num_rows; r < padded_rows; ++r) out.data[k * out.stride + r] = Operand(0);
    }

    // out[row / kDepth][column]: either operand of a product that sums over the row index, zero-padded to padded_rows
    // and padded_length.
    static void by_row(const E* const* src, int num_rows, int padded_rows, int length, int padded_length,
                       Matrix<Operand> out) {
        for (int r = 0; r < padded_rows; r += kDepth) {
            Operand* o = out.data + r / kDepth * out.stride;
            const E* low = r < num_rows ? src[r] : nullptr;
            if constexpr (kDepth == 1) {
                if (low)
                    rows(&low, 1, length, {o, 0});
                else
                    memset(o, 0, sizeof(Operand) * length);
            } else {
                interleave(low, r + 1 < num_rows ? src[r + 1] : nullptr, length, o);
            }
            memset(o + length, 0, sizeof(Operand) * (padded_length - length));
        }
    }

private:
    FA_INLINE void memcpy_lanes(Operand* o, Vec<T> x, int count) { memcpy(o, &x, sizeof(Operand) * count); }

    FA_INLINE void transpose_block(const E* const* src, int num_rows, int length, int k0, Matrix<Operand> out, int r0) {
        Operand block[kBlock][kBlock];
        const bool whole = num_rows == kBlock && (k0 + kBlock) * kDepth <= length;
        const int depth_here = whole ? kBlock : min(kBlock, depth_of(length) - k0);
        for (int r = 0; r < num_rows; ++r) {
            if (whole && src[r]) {
                for (int k = 0; k < kBlock; ++k) block[r][k] = operand(src[r], k0 + k, (k0 + kBlock) * kDepth);
            } else {
                for (int k = 0; k < depth_here; ++k)
                    block[r][k] = src[r] ? operand(src[r], k0 + k, length) : Operand(0);
            }
        }
        Operand* o = out.data + k0 * out.stride + r0;
        if (whole) {
            for (int k = 0; k < kBlock; ++k)
                for (int r = 0; r < kBlock; ++r) o[k * out.stride + r] = block[r][k];
        } else {
            for (int k = 0; k < depth_here; ++k)
                for (int r = 0; r < num_rows; ++r) o[k * out.stride + r] = block[r][k];
        }
    }

    FA_INLINE void interleave(const E* low, const E* high, int length, Operand* o) {
        if (low && high) {
            for (int k = 0; k < length; ++k) o[k] = low[k].bits | uint32_t(high[k].bits) << 16;
        } else {
            for (int k = 0; k < length; ++k) o[k] = (low ? low[k].bits : 0) | (high ? uint32_t(high[k].bits) << 16 : 0);
        }
    }
};

// Two rows of fp32 as one row of bf16 pairs.
FA_INLINE Vec<uint32_t> pack_pair(Vec<float> low, Vec<float> high) {
    return (round_to_bf16(low) >> 16) | (round_to_bf16(high) & 0xffff0000u);
}

// Element i of a pair, or the operand itself; also for vectors.
FA_INLINE float unpack_operand(uint32_t pair, int i) { return bits_to_float(i ? pair & 0xffff0000u : pair << 16); }
FA_INLINE Vec<float> unpack_operand(Vec<uint32_t> pair, int i) {
    return (Vec<float>)(i ? pair & 0xffff0000u : pair << 16);
}
template <class T> FA_INLINE T unpack_operand(T x, int) { return x; }

// Whether a packed operand holds NaN or infinity.
template <class Operand> static bool holds_nonfinite(Matrix<const Operand> m, int num_rows, int num_columns) {
    bool found = false;
    for (int r = 0; r < num_rows; ++r)
        for (int k = 0; k < num_columns; ++k) {
            const Operand x = m.data[r * m.stride + k];
            if constexpr (std::is_same_v<Operand, uint32_t>) {
                found |= (x & 0x7f80u) == 0x7f80u || (x & 0x7f800000u) == 0x7f800000u;
            } else {
                found |= !(x - x == 0);
            }
        }
    return found;
}

// Bump allocator for the memory of one task, in 64-byte steps. With a null base it only computes the size.
class Arena {
public:
    explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
    template <class T> T* take(int64_t count) {
        T* p = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
        used_ += round_up<int64_t>(count * int64_t(sizeof(T)), 64);
        return p;
    }
    size_t used() const { return size_t(used_); }

private:
    char* start_;
    int64_t used_ = 0;
};

}  // namespace flash_attn::cpu::FA_ISA
