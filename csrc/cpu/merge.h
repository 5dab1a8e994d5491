// Merges the partial results of chunks of keys, in the order of the chunks: each is the online softmax of its chunk.
#pragma once
#include "cpu/row_result.h"
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

// Unnormalised output, row max (NaN if a score is) and row sum of the rows of a tile over one chunk of keys.
template <class T> struct Partial {
    T *row_max, *row_sum;  // [num_rows]
    T* out;                // [num_rows][stride]
    int stride;

    Partial(void* data, int num_rows, int head_dim_v) : stride(round_up(head_dim_v, kLanes<T>)) {
        Arena arena(data);
        row_max = arena.take<T>(num_rows);
        row_sum = arena.take<T>(num_rows);
        out = arena.take<T>(int64_t(num_rows) * stride);
    }
    static size_t bytes(int num_rows, int head_dim_v) {
        Arena counter(nullptr);
        counter.take<T>(num_rows);
        counter.take<T>(num_rows);
        counter.take<T>(int64_t(num_rows) * round_up(head_dim_v, kLanes<T>));
        return counter.used();
    }
    T* row(int i) const { return out + int64_t(i) * stride; }
};

template <class E> size_t partial_bytes(const FwdParams& params, int num_rows) {
    return Partial<Compute<E>>::bytes(num_rows, params.problem.head_dim_v);
}

template <class E> void merge(const FwdParams& params, const MergeTask& task) {
    using T = Compute<E>;
    const Problem& p = params.problem;
    const TileRows rows(task.tile);
    const Sequence seq = sequence_at(p, task.tile.batch);
    const HeadVariant<T> variant(p, seq, task.tile.batch, task.tile.first_head);
    const int64_t bytes = int64_t(partial_bytes<E>(params, rows.count));
    const auto partial = [&](int chunk) {
        return Partial<T>(static_cast<char*>(task.partials) + chunk * bytes, rows.count, p.head_dim_v);
    };
    for (int row = 0; row < rows.count; ++row) {
        T row_max = -INFINITY, row_sum = 0, factor[kMaxSplits];
        for (int chunk = 0; chunk < task.num_chunks; ++chunk) {
            const T x = partial(chunk).row_max[row];
            row_max = x > row_max || x != x ? x : row_max;
        }
        // A row that has seen no key must not compute inf - inf.
        const T offset = row_max == T(-INFINITY) ? T(0) : row_max;
        for (int chunk = 0; chunk < task.num_chunks; ++chunk) {
            factor[chunk] = exp2(splat<T>((partial(chunk).row_max[row] - offset) * variant.scale_log2))[0];
            row_sum += partial(chunk).row_sum[row] * factor[chunk];
        }
        const int64_t query = seq.first_row_q + rows.query(row);
        const T inverse =
            finish_row(params, task.tile.batch, query, rows.head(row), row_max * variant.scale, row_sum, T(1));
        with_result_row<E>(p, params.out, task.tile.batch, query, rows.head(row), [&](auto* out) {
            for_each_vector<T>(p.head_dim_v, [&](int d, int count) {
                Vec<T> sum{};
                for (int chunk = 0; chunk < task.num_chunks; ++chunk)
                    sum += load(partial(chunk).row(row) + d) * factor[chunk];
                store_some(out + d, sum * inverse, count);
            });
        });
    }
}

}  // namespace flash_attn::cpu::FA_ISA
