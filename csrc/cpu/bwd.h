// Backward pass (FlashAttention-2, algorithm 2). A task owns some key tiles of one key head. For each it visits the
// query tiles that see it: S = Q K^T and dP = dO V^T with vector lanes over keys (K^T and V^T are packed once per key
// tile), then P = exp(S - lse), dS = P (dP - dsoftmax_sum), dV += P^T dO, dK += dS^T Q, dQ += dS K. softmax_lse and
// dsoftmax_sum hold all row statistics, so there are no reductions within a vector.
#pragma once
#include "cpu/bwd_rows.h"
#include "cpu/long_sum.h"
#include "cpu/row_vectors.h"
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

template <class E, class Dot> class BwdSlice {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    using PackE = Pack<E, Dot>;
    static constexpr int L = kLanes<T>, kDepth = Dot::kDepth;
    static constexpr int kKeys = kKeyTile, kQueries = 64;

    struct Buffers {
        Operand *k_t, *v_t;                  // [head_dim / kDepth][kKeys], [head_dim_v / kDepth][kKeys]
        Operand* k_by_row;                   // [kKeys / kDepth][padded head_dim]
        Operand *q, *dout;                   // [kQueries][padded head_dim(_v) / kDepth]
        Operand *q_by_row, *dout_by_row;     // [kQueries / kDepth][padded head_dim(_v)]; q, dout if kDepth = 1
        T *s, *dp;                           // [kQueries][kKeys]: scores, overwritten by P; dP, overwritten by dS
        Operand *p_by_row, *ds_by_row, *ds;  // [kQueries / kDepth][kKeys] twice, [kQueries][kKeys / kDepth]
        LongSum<T> dk, dv;                   // [kKeys][padded head_dim(_v)]; one term per query tile of each head
        T* derivative;                       // [kQueries][kKeys]: derivative of softcap
        uint16_t* keep;                      // [kQueries][kKeys]
        Operand* q_vectors;                  // [kDecodeRows][vectors of head_dim]: of sequences with few rows
        int64_t* k_offset;                   // [kKeys]: likewise; of rows from the first one of the head on
        const E** rows;                      // [kKeys]

        Buffers(Arena& arena, const Problem& p) {
            const int row = padded_row<T>(p.head_dim), row_v = padded_row<T>(p.head_dim_v);
            k_t = arena.take<Operand>(int64_t(PackE::depth_of(p.head_dim)) * kKeys);
            v_t = arena.take<Operand>(int64_t(PackE::depth_of(p.head_dim_v)) * kKeys);
            k_by_row = arena.take<Operand>(kKeys / kDepth * row);
            q_by_row = arena.take<Operand>(kQueries / kDepth * row);
            dout_by_row = arena.take<Operand>(kQueries / kDepth * row_v);
            s = arena.take<T>(kQueries * kKeys);
            dp = arena.take<T>(kQueries * kKeys);
            if constexpr (kDepth == 1) {
                q = q_by_row, dout = dout_by_row, p_by_row = s, ds_by_row = ds = dp;
            } else {
                q = arena.take<Operand>(kQueries * PackE::depth_of(p.head_dim));
                dout = arena.take<Operand>(kQueries * PackE::depth_of(p.head_dim_v));
                p_by_row = arena.take<Operand>(kQueries / kDepth * kKeys);
                ds_by_row = arena.take<Operand>(kQueries / kDepth * kKeys);
                ds = arena.take<Operand>(kQueries * kKeys / kDepth);
            }
            const bool long_sums = most_tiles(p) > LongSum<T>::kTerms;
            dk = LongSum<T>::take(arena, kKeys * row, long_sums);
            dv = LongSum<T>::take(arena, kKeys * row_v, long_sums);
            derivative = arena.take<T>(p.score.softcap > 0 ? kQueries * kKeys : 0);
            keep = arena.take<uint16_t>(p.dropout.threshold ? kQueries * kKeys : 0);
            q_vectors = arena.take<Operand>(int64_t(kDecodeRows) * row_vectors(p));
            k_offset = arena.take<int64_t>(kKeys);
            rows = arena.take<const E*>(kKeys);
        }
    };

    static int row_vectors(const Problem& p) { return RowVectors<E, Dot>::count_of(p.head_dim) * L; }
    // Number of query tiles that may see one key tile.
    static int64_t most_tiles(const Problem& p) {
        return int64_t(p.num_heads / p.num_heads_k) * ceil_div(p.seqlens.seqlen_q, kQueries);
    }

public:
    static size_t scratch_bytes(const BwdParams& params) {
        Arena counter(nullptr);
        Buffers(counter, params.problem);
        return counter.used();
    }

    BwdSlice(const BwdParams& params, const BwdTask& task, Arena arena)
        : params_(params), p_(params.problem), task_(task), b_(arena, p_), seq_(sequence_at(p_, task.batch)),
          mask_(RangeMask::of(p_, seq_, task.batch, task.head_k * (p_.num_heads / p_.num_heads_k))),
          few_rows_(has_few_rows(p_, seq_)), heads_per_key_head_(p_.num_heads / p_.num_heads_k),
          row_(padded_row<T>(p_.head_dim)), row_v_(padded_row<T>(p_.head_dim_v)),
          row_q_(kDepth == 1 ? row_ : PackE::depth_of(p_.head_dim)),
          row_dout_(kDepth == 1 ? row_v_ : PackE::depth_of(p_.head_dim_v)),
          rescale_(scalars_of<T>(p_).dropout_rescale) {}

    void run() {
        for (int g = 0; g < heads_per_key_head_; ++g)
            memset(dq_accum(task_.head_k * heads_per_key_head_ + g, 0), 0, sizeof(T) * seq_.seqlen_q * row_);
        for (int tile = task_.split; tile * kKeys < seq_.seqlen_k; tile += task_.num_splits) {
            keys_ = {tile * kKeys, min((tile + 1) * kKeys, seq_.seqlen_k)};
            load_keys();
            const Range rows = mask_.q_range(keys_);
            for (int g = 0; g < heads_per_key_head_; ++g)
                // Query tiles start at multiples of a dropout block.
                for (int row = round_down(rows.begin, kDropoutBlockRows); row < rows.end; row += kQueries)
                    add_tile(task_.head_k * heads_per_key_head_ + g, {row, min(row + kQueries, rows.end)});
            store_keys();
        }
    }

private:
    T* dq_accum(int head, int64_t row) const {
        const int64_t first = (int64_t(task_.split) * p_.num_heads + head) * seq_.seqlen_q + row;
        return static_cast<T*>(task_.dq_accum) + first * row_;
    }

    void load_keys() {
        const int count = keys_.end - keys_.begin, padded = round_up(count, L);
        const int64_t first = seq_.first_row_k + keys_.begin;
        collect_rows<E>(p_.v, task_.batch, first, task_.head_k, count, b_.rows);
        PackE::transposed(b_.rows, count, padded, p_.head_dim_v, {b_.v_t, kKeys});
        collect_rows<E>(p_.k, task_.batch, first, task_.head_k, count, b_.rows);
        if (few_rows_)
            for (int i = 0; i < kKeys; ++i) b_.k_offset[i] = int64_t(min(i, count - 1)) * p_.k.row_stride;
        else
            PackE::transposed(b_.rows, count, padded, p_.head_dim, {b_.k_t, kKeys});
        PackE::by_row(b_.rows, count, padded, p_.head_dim, row_, {b_.k_by_row, row_});
        b_.dk.clear(count * row_);
        b_.dv.clear(count * row_v_);
        num_tiles_ = 0;
    }

    // Called before a query tile is added to dK and dV.
    void count_tile() {
        constexpr int kTerms = LongSum<T>::kTerms;
        if (num_tiles_ > 0 && num_tiles_ % kTerms == 0) {
            const int count = keys_.end - keys_.begin;
            b_.dk.move_on(count * row_, num_tiles_ == kTerms);
            b_.dv.move_on(count * row_v_, num_tiles_ == kTerms);
        }
        ++num_tiles_;
    }

    void load_queries(int head, Range rows) {
        const int count = rows.end - rows.begin, padded = round_up(count, kDepth);
        const int64_t first = seq_.first_row_q + rows.begin;
        collect_rows<E>(p_.q, task_.batch, first, head, count, b_.rows);
        load_rows(count, padded, p_.head_dim, row_, b_.q_by_row, {b_.q, row_q_});
        collect_rows<E>(params_.dout, task_.batch, first, head, count, b_.rows);
        load_rows(count, padded, p_.head_dim_v, row_v_, b_.dout_by_row, {b_.dout, row_dout_});
    }
    void load_rows(int count, int padded, int length, int padded_length, Operand* by_row, Matrix<Operand> plain) {
        PackE::by_row(b_.rows, count, padded, length, padded_length, {by_row, padded_length});
        if constexpr (kDepth == 2) {
            if (count < padded) b_.rows[count] = nullptr;
            PackE::rows(b_.rows, padded, length, plain);
        }
    }

    void add_tile(int head, Range rows) {
        const Range seen = mask_.kv_range(rows);
        const int first = max(seen.begin - keys_.begin, 0), last = min(seen.end, keys_.end) - keys_.begin;
        if (last <= first) return;
        // Columns of the products: whole vectors; keys that no row sees are masked.
        const Range part{round_down(first, L), round_up(last, L)};
        const int count = rows.end - rows.begin, padded = round_up(count, kDepth), columns = part.end - part.begin;
        load_queries(head, rows);
        if (few_rows_)
            multiply_in_place(head, rows);
        else
            gemm_over_head_dim<Dot>(padded, columns, PackE::depth_of(p_.head_dim), {b_.q, row_q_},
                                    {b_.k_t + part.begin, kKeys}, {b_.s + part.begin, kKeys});
        gemm_over_head_dim<Dot>(padded, columns, PackE::depth_of(p_.head_dim_v), {b_.dout, row_dout_},
                                {b_.v_t + part.begin, kKeys}, {b_.dp + part.begin, kKeys});
        const bool is_full = mask_.is_full_block(rows, {keys_.begin + part.begin, keys_.begin + part.end});
        const HeadVariant<T> variant(p_, seq_, task_.batch, head);
        if (variant.modified) modify_scores(variant, rows, part);
        if (p_.dropout.threshold) drop_dp(variant.score.dropout, rows, part);
        weights_and_gradients(head, rows, padded, part, is_full, variant);
        if (p_.dropout.threshold) drop_p(padded, part);
        accumulate(head, rows, padded, {first, last}, part, is_full);
    }

    // S of the whole key tile, as the forward pass computes it.
    void multiply_in_place(int head, Range rows) {
        const int count = rows.end - rows.begin, keys = keys_.end - keys_.begin, stride = row_vectors(p_);
        for (int r = 0; r < count; ++r)
            RowVectors<E, Dot>::pack(row_ptr<E>(p_.q, task_.batch, seq_.first_row_q + rows.begin + r, head),
                                     p_.head_dim, b_.q_vectors + r * stride);
        const RowsInPlace<E> k{row_ptr<E>(p_.k, task_.batch, seq_.first_row_k + keys_.begin, task_.head_k),
                               b_.k_offset};
        DotProducts<E, Dot>::multiply(count, keys, p_.head_dim, {b_.q_vectors, stride}, k, k, {b_.s, kKeys});
    }

    void modify_scores(const HeadVariant<T>& variant, Range rows, Range part) {
        for (int r = 0; r < rows.end - rows.begin; ++r) {
            const int distance = variant.score.distance(rows.begin + r, keys_.begin);
            for (int c = part.begin; c < part.end; c += L) {
                T* s = b_.s + r * kKeys + c;
                const Vec<T> product = load(s);
                store(s, variant.transform(product, IntLane<T>(distance - c) - lane_index<T>()));
                if (variant.score.has_derivative()) store(b_.derivative + r * kKeys + c, variant.derivative(product));
            }
        }
    }

    void drop_dp(const DropoutMask& dropout, Range rows, Range part) {
        const int first = round_down(part.begin, kDropoutBlockKeys);
        dropout_keep<false>(dropout, rows.begin, rows.end - rows.begin, keys_.begin + first, part.end - first,
                            b_.keep + first, kKeys);
        for (int r = 0; r < rows.end - rows.begin; ++r)
            for (int c = part.begin; c < part.end; c += L) {
                T* dp = b_.dp + r * kKeys + c;
                store(dp, keep_only<T>(widen_mask<T>(b_.keep + r * kKeys + c), load(dp) * rescale_));
            }
    }

    // Drops weights for dV only: dS needs the weights before dropout. The rescale factor is applied at the end.
    void drop_p(int padded, Range part) {
        for (int r = 0; r < padded; r += kDepth)
            for (int c = part.begin; c < part.end; c += L) {
                const uint16_t* keep = b_.keep + r * kKeys + c;
                Operand* p = b_.p_by_row + r / kDepth * kKeys + c;
                if constexpr (kDepth == 1) {
                    store(p, keep_only<T>(widen_mask<T>(keep), load(p)));
                } else {
                    store(p, load(p) & pair_mask(keep, keep + kKeys));
                }
            }
    }

    // P and dS in the layouts of the products. Rows past the last query give 0; they are always masked, since some of
    // their inputs are uninitialised.
    void weights_and_gradients(int head, Range rows, int padded, Range part, bool is_full,
                               const HeadVariant<T>& variant) {
        const int64_t row0 = seq_.first_row_q + rows.begin;
        const T *lse = row_ptr<T>(params_.softmax_lse, task_.batch, row0, head),
                *dsoftmax_sum = row_ptr<T>(params_.dsoftmax_sum, task_.batch, row0, head);
        const bool all_attend = is_full && padded == rows.end - rows.begin;
        for (int r = 0; r < padded; r += kDepth) {
            T row_lse[kDepth], sum[kDepth], dlse[kDepth];
            VisibleKeys<IntLane<T>> seen[kDepth];
            for (int i = 0; i < kDepth; ++i) {
                const int row = rows.begin + r + i;
                const bool valid = row < rows.end;
                // A query without visible keys: -infinity (this package) or +infinity (flash_attn 2.8.3).
                row_lse[i] = valid && lse[r + i] != T(-INFINITY) ? lse[r + i] : T(INFINITY);
                sum[i] = valid ? dsoftmax_sum[r + i] : T(0);
                dlse[i] =
                    valid && params_.dlse.data ? *row_ptr<T>(params_.dlse, task_.batch, row0 + r + i, head) : T(0);
                seen[i] = valid ? VisibleKeys<IntLane<T>>(mask_.visible(row)) : VisibleKeys<IntLane<T>>::none();
            }
            for (int c = part.begin; c < part.end; c += L) {
                Vec<T> p[kDepth], ds[kDepth];
#pragma GCC unroll 2
                for (int i = 0; i < kDepth; ++i) {
                    const int at = (r + i) * kKeys + c;
                    p[i] = exp2((load(b_.s + at) * variant.scale - row_lse[i]) * T(kLog2e));
                    ds[i] = p[i] * ((load(b_.dp + at) - sum[i]) + dlse[i]);
                    if (variant.score.has_derivative()) ds[i] *= load(b_.derivative + at);
                    if (all_attend) continue;
                    const IntVec<T> keep = seen[i].keep(lane_index<T>() + IntLane<T>(keys_.begin + c));
                    p[i] = keep_only<T>(keep, p[i]);
                    ds[i] = keep_only<T>(keep, ds[i]);
                }
                store_operands(r, c, p, ds);
            }
        }
    }

    __attribute__((always_inline)) void store_operands(int r, int c, const Vec<T>* p, const Vec<T>* ds) {
        const int at = r / kDepth * kKeys + c;
        if constexpr (kDepth == 1) {
            store(b_.s + at, p[0]);
            store(b_.dp + at, ds[0]);
        } else {
            store(b_.p_by_row + at, pack_pair(p[0], p[1]));
            store(b_.ds_by_row + at, pack_pair(ds[0], ds[1]));
            BFloat16* plain = reinterpret_cast<BFloat16*>(b_.ds);
            store_elements(plain + r * kKeys + c, ds[0]);
            store_elements(plain + (r + 1) * kKeys + c, ds[1]);
        }
    }

    // seen: the keys of the tile that at least one row sees; part: the same range rounded to whole vectors.
    void accumulate(int head, Range rows, int padded, Range seen, Range part, bool is_full) {
        count_tile();
        const int keys = seen.end - seen.begin, depth = padded / kDepth, count = rows.end - rows.begin;
        if (!is_full && nonfinite(padded)) return accumulate_selected(head, rows, seen);
        gemm<Dot, Update::kAdd, true>(keys, row_v_, depth, {b_.p_by_row + seen.begin, kKeys}, {b_.dout_by_row, row_v_},
                                      {b_.dv.recent + seen.begin * row_v_, row_v_});
        gemm<Dot, Update::kAdd, true>(keys, row_, depth, {b_.ds_by_row + seen.begin, kKeys}, {b_.q_by_row, row_},
                                      {b_.dk.recent + seen.begin * row_, row_});
        gemm<Dot, Update::kAdd, false>(
            count, row_, (part.end - part.begin) / kDepth, {b_.ds + part.begin / kDepth, kKeys / kDepth},
            {b_.k_by_row + part.begin / kDepth * row_, row_}, {dq_accum(head, rows.begin), row_});
    }

    bool nonfinite(int padded) const {
        return holds_nonfinite<Operand>({b_.q_by_row, row_}, padded / kDepth, row_) ||
               holds_nonfinite<Operand>({b_.dout_by_row, row_v_}, padded / kDepth, row_v_) ||
               holds_nonfinite<Operand>({b_.k_by_row, row_}, ceil_div(keys_.end - keys_.begin, kDepth), row_);
    }

    // A masked weight is 0, and 0 * NaN is NaN: multiplies only visible pairs, in the summation order of gemm.
    void accumulate_selected(int head, Range rows, Range seen) {
        const Range queries{0, rows.end - rows.begin};
        for (int key = seen.begin; key < seen.end; ++key) {
            const auto keep = [&](int r) { return mask_.keep(rows.begin + r, keys_.begin + key); };
            const auto p = [&](int r) { return number(b_.p_by_row, kKeys, r, key); };
            const auto ds = [&](int r) { return number(b_.ds_by_row, kKeys, r, key); };
            add_selected(queries, keep, p, {b_.dout_by_row, row_v_}, b_.dv.recent + key * row_v_);
            add_selected(queries, keep, ds, {b_.q_by_row, row_}, b_.dk.recent + key * row_);
        }
        for (int r = queries.begin; r < queries.end; ++r) {
            const auto keep = [&](int key) { return mask_.keep(rows.begin + r, keys_.begin + key); };
            const auto ds = [&](int key) { return number(b_.ds_by_row, kKeys, r, key); };
            add_selected(seen, keep, ds, {b_.k_by_row, row_}, dq_accum(head, rows.begin + r));
        }
    }
    static T number(const Operand* by_row, int stride, int i, int column) {
        return unpack_operand(by_row[i / kDepth * stride + column], i % kDepth);
    }
    // sum += weight(row) * row, over the rows of an operand with keep(row).
    template <class Keep, class Weight>
    static void add_selected(Range rows, Keep keep, Weight weight, Matrix<const Operand> by_row, T* sum) {
        for (int d = 0; d < by_row.stride; d += L) {
            Vec<T> added{};
            for (int r = rows.begin; r < rows.end; ++r)
                if (keep(r))
                    added += splat<T>(weight(r)) *
                             unpack_operand(load(by_row.data + r / kDepth * by_row.stride + d), r % kDepth);
            store(sum + d, load(sum + d) + added);
        }
    }

    void store_keys() {
        const T scale = T(p_.score.softmax_scale);
        const bool moved_on = num_tiles_ > LongSum<T>::kTerms;
        for (int r = 0; r < keys_.end - keys_.begin; ++r) {
            const int64_t row = seq_.first_row_k + keys_.begin + r;
            with_result_row<E>(p_, params_.dk, task_.batch, row, task_.head_k, [&](auto* dk) {
                for_each_vector<T>(p_.head_dim, [&](int d, int n) {
                    store_some(dk + d, b_.dk.at(r * row_ + d, moved_on) * scale, n);
                });
            });
            with_result_row<E>(p_, params_.dv, task_.batch, row, task_.head_k, [&](auto* dv) {
                for_each_vector<T>(p_.head_dim_v, [&](int d, int n) {
                    store_some(dv + d, b_.dv.at(r * row_v_ + d, moved_on) * rescale_, n);
                });
            });
        }
    }

    const BwdParams& params_;
    const Problem& p_;
    const BwdTask task_;
    const Buffers b_;
    const Sequence seq_;
    const RangeMask mask_;
    const bool few_rows_;
    const int heads_per_key_head_, row_, row_v_;  // row_: padded head_dim
    const int row_q_, row_dout_;                  // row strides of b_.q and b_.dout
    const T rescale_;                             // of the weights that dropout keeps
    Range keys_{0, 0};                            // the key tile
    int64_t num_tiles_ = 0;                       // query tiles added so far to dK and dV of this key tile
};

}  // namespace flash_attn::cpu::FA_ISA
