// Shared by the forward and backward tiles of one head: element access by row, and the policies of policy/ applied to
// vectors.
#pragma once
#include "cpu/pack.h"
#include "policy/variant.h"  // not in the prelude: always inlined, and calls the tanh of this instruction set

namespace flash_attn::cpu::FA_ISA {

// The rows of a forward tile: queries of heads that share a key head.
struct TileRows {
    int first_head, heads, first_query, count;

    explicit TileRows(const FwdTask& task)
        : first_head(task.first_head), heads(task.heads), first_query(task.first_query),
          count(task.num_queries * task.heads) {}

    int query(int row) const { return first_query + (heads == 1 ? row : row / heads); }
    int head(int row) const { return first_head + (heads == 1 ? 0 : row % heads); }
    Range queries(Range rows) const { return {query(rows.begin), query(rows.end - 1) + 1}; }
};

template <class E> FA_INLINE E* row_ptr(const TensorView& t, int64_t batch, int64_t row, int64_t head) {
    return static_cast<E*>(t.data) + batch * t.batch_stride + row * t.row_stride + head * t.head_stride;
}
template <class T> FA_INLINE T* row_ptr(const RowView& t, int64_t batch, int64_t row, int64_t head) {
    return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride + row;
}
// Calls f(row) with a row of out, dq, dk or dv, whose elements are those of the computation in partial results.
template <class E, class F>
FA_INLINE void with_result_row(const Problem& p, const TensorView& t, int64_t batch, int64_t row, int64_t head, F f) {
    p.float_results ? f(row_ptr<Compute<E>>(t, batch, row, head)) : f(row_ptr<E>(t, batch, row, head));
}
// Pointers to `count` rows of q, out or dout, starting at row `first` of the tensor.
template <class E> FA_INLINE void collect_rows(const TensorView& t, int64_t batch, int64_t first, int64_t head,
                                               int count, const E** rows) {
    for (int r = 0; r < count; ++r) rows[r] = row_ptr<E>(t, batch, first + r, head);
}
// Pointers to the rows of a forward tile in q.
template <class E>
FA_INLINE void collect_query_rows(const TensorView& q, int64_t batch, int64_t first, TileRows tile, const E** rows) {
    for (int r = 0; r < tile.count; ++r) rows[r] = row_ptr<E>(q, batch, first + tile.query(r), tile.head(r));
}
// Pointers to `count` rows of k or v, contiguous or paged; null for a page outside the pool.
template <class E> FA_INLINE void collect_kv_rows(const TensorView& t, const PagedKv& paged, int batch, int64_t first,
                                                  int64_t head, int count, const E** rows) {
    for (int r = 0; r < count;) {
        const int64_t offset = kv_row_offset(t, paged, batch, first + r);
        const E* const row = offset < 0 ? nullptr : static_cast<const E*>(t.data) + offset + head * t.head_stride;
        const int64_t step = offset < 0 ? 0 : t.row_stride;
        const int end =
            paged.block_table ? int(min<int64_t>(count, r + paged.page_size - (first + r) % paged.page_size)) : count;
        for (int i = 0; i < end - r; ++i) rows[r + i] = row + i * step;
        r = end;
    }
}

struct VectorMath {
    template <class V> static __attribute__((always_inline)) V tanh(V x) {
        return FA_ISA::tanh<std::remove_cvref_t<decltype(x[0])>>(x);
    }
};

// The variant of one head. The CPU has one instance for all: the window may be unbounded, and
// there may be no key ranges. Plain scores remain products,
// and softmax multiplies them by `scale`; modified scores come scaled from transform(), with scale = 1.
template <class T> struct HeadVariant : AttentionVariant<RangeMask, ModifiedScore<T>> {
    bool modified, biased;  // scores are modified; ALiBi is among it
    T scale, scale_log2;    // scale_log2 = scale * log2(e)

    HeadVariant(const Problem& p, const Sequence& seq, int batch, int head)
        : AttentionVariant<RangeMask, ModifiedScore<T>>(p, seq, batch, head), modified(modifies_scores(p.score)),
          biased(p.score.alibi_slopes), scale(modified ? T(1) : scalars_of<T>(p).scale),
          scale_log2(modified ? T(kLog2e) : scalars_of<T>(p).scale_log2) {}

    // Scores of products x whose keys are `distance` before their queries.
    template <int kStage = 0> __attribute__((always_inline)) Vec<T> transform(Vec<T> x, IntVec<T> distance) const {
        if constexpr (kStage == ModifiedScore<T>::kStages) {
            return x;
        } else {
            if (this->score.template applies<kStage>())
                x = this->score.template stage<kStage, VectorMath>(x, __builtin_convertvector(distance, Vec<T>));
            return transform<kStage + 1>(x, distance);
        }
    }
    // The same for one score per lane, of heads with slopes of their own.
    __attribute__((always_inline)) Vec<T> transform(Vec<T> x, IntVec<T> distance, Vec<T> slope) const {
        x = this->score.has_derivative() ? this->score.template stage<1, VectorMath>(x, x)
                                         : this->score.template stage<0, VectorMath>(x, x);
        return biased ? x + alibi_bias(slope, __builtin_convertvector(distance, Vec<T>)) : x;
    }
    // d score / d (softmax_scale x).
    __attribute__((always_inline)) Vec<T> derivative(Vec<T> x) const {
        return this->score.template derivative<VectorMath>(x);
    }
};

// Dropout mask: 16 one bits for each kept pair, computed for tiles that start at multiples of 16 rows and 32 keys.
// kLanesAreRows: out[key][row], else out[row][key]; stride is the row stride of out.
template <bool kLanesAreRows> static __attribute__((noinline)) void dropout_keep(const DropoutMask& mask, int row0,
                                                                                 int num_rows, int key0, int num_keys,
                                                                                 uint16_t* out, int stride) {
    constexpr int kOctet = 8;
    const auto keep = [&](uint32_t bits) { return uint16_t(bits < mask.threshold ? 0 : 0xffff); };
    for (int r = 0; r < num_rows; r += kDropoutBlockRows)
        for (int k = 0; k < num_keys; k += kDropoutBlockKeys)
            for (int a = 0; a < kOctet; ++a) {
                uint32_t words[4][kOctet];
                for (int lane = 0; lane < kOctet; ++lane) {
                    const PhiloxOutput x = kLanesAreRows
                                               ? mask.block(uint32_t(row0 + r + lane), uint32_t(key0 + k + a))
                                               : mask.block(uint32_t(row0 + r + a), uint32_t(key0 + k + lane));
                    for (int w = 0; w < 4; ++w) words[w][lane] = x.word[w];
                }
                for (int w = 0; w < 4; ++w)
                    for (int lane = 0; lane < kOctet; ++lane) {
                        const uint16_t low = keep(words[w][lane] & 0xffff), high = keep(words[w][lane] >> 16);
                        if constexpr (kLanesAreRows) {
                            uint16_t* line = out + (k + 8 * w + a) * stride + r + lane;
                            line[0] = low;
                            line[8] = high;
                        } else {
                            uint16_t* line = out + (r + a) * stride + k + 8 * w + lane;
                            line[0] = low;
                            line[8 * stride] = high;
                        }
                    }
            }
}
// A mask of Vec<T> from 16-bit masks.
template <class T> FA_INLINE IntVec<T> widen_mask(const uint16_t* keep) {
    return __builtin_convertvector(*reinterpret_cast<const typename HalfwordsOf<T>::Signed*>(keep), IntVec<T>);
}
// A mask of bf16 pairs from two rows of 16-bit masks: low and high halves.
FA_INLINE Vec<uint32_t> pair_mask(const uint16_t* low, const uint16_t* high) {
    return ((Vec<uint32_t>)widen_mask<float>(low) & 0xffffu) | ((Vec<uint32_t>)widen_mask<float>(high) & 0xffff0000u);
}
template <class T> FA_INLINE Vec<T> keep_only(IntVec<T> mask, Vec<T> x) { return (Vec<T>)((IntVec<T>)x & mask); }

}  // namespace flash_attn::cpu::FA_ISA
