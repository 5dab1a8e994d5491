// Forward pass of one tile of rows (FlashAttention-2, algorithm 1), transposed: S^T = K Q^T and O^T += V^T P^T. Vector
// lanes run over rows, so row max, row sum and rescaling need no reduction within a vector, a partial last key tile
// needs no padding, and K and V are read as broadcast scalars. Only Q and O are transposed. Rows are the queries of one
// head or, where there are few, of all heads that share a key head.
#pragma once
#include "cpu/merge.h"
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

template <class E, class Dot> class FwdTile {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    using PackE = Pack<E, Dot>;
    static constexpr int L = kLanes<T>, kDepth = Dot::kDepth;
    static constexpr int kPanel = 64;  // rows whose scores are held at a time
    static constexpr int kPanels = kQueryTile / kPanel;
    static constexpr int kMaxGroup = kPanel / L < 4 ? kPanel / L : 4;  // vectors of rows per softmax_group

    struct Buffers {
        Operand* q_t;                                // [panel][head_dim / kDepth][kPanel]
        Operand *k, *v;                              // [key][head_dim / kDepth], [key / kDepth][head_dim_v]
        Operand* p;                                  // [key / kDepth][kPanel]; kDepth = 1: same memory as s
        T *s, *o_t;                                  // [key][kPanel], [panel][head_dim_v][kPanel]
        T *row_max, *row_sum, *factor;               // [kQueryTile] twice, [kPanel]
        T* slope;                                    // [kQueryTile]: of ALiBi
        T* nan;                                      // [kQueryTile]: NaN once a score is, which row_max may lose; or 0
        IntLane<T>*position, *first_key, *last_key;  // [kQueryTile]: on the axis of keys; visible keys
        uint16_t* keep;                              // [key][kPanel]
        const E** rows;                              // [kQueryTile or kKeyTile]

        Buffers(Arena& arena, const Problem& p) {
            const int depth = PackE::depth_of(p.head_dim);
            q_t = arena.take<Operand>(int64_t(kQueryTile) * depth);
            k = arena.take<Operand>(int64_t(kKeyTile) * depth);
            v = arena.take<Operand>(int64_t(kKeyTile) / kDepth * p.head_dim_v);
            s = arena.take<T>(kKeyTile * kPanel);
            if constexpr (kDepth == 1)
                this->p = s;
            else
                this->p = arena.take<Operand>(kKeyTile / kDepth * kPanel);
            o_t = arena.take<T>(int64_t(kQueryTile) * p.head_dim_v);
            row_max = arena.take<T>(kQueryTile);
            row_sum = arena.take<T>(kQueryTile);
            factor = arena.take<T>(kPanel);
            slope = arena.take<T>(kQueryTile);
            nan = arena.take<T>(kQueryTile);
            position = arena.take<IntLane<T>>(kQueryTile);
            first_key = arena.take<IntLane<T>>(kQueryTile);
            last_key = arena.take<IntLane<T>>(kQueryTile);
            keep = arena.take<uint16_t>(p.dropout.threshold ? kKeyTile * kPanel : 0);
            rows = arena.take<const E*>(kQueryTile > kKeyTile ? kQueryTile : kKeyTile);
        }
    };

public:
    static size_t scratch_bytes(const FwdParams& params) {
        Arena counter(nullptr);
        Buffers(counter, params.problem);
        return counter.used();
    }

    FwdTile(const FwdParams& params, const FwdTask& task, Arena arena)
        : params_(params), p_(params.problem), task_(task), rows_(task), b_(arena, p_),
          seq_(sequence_at(p_, task.batch)), variant_(p_, seq_, task.batch, task.first_head), mask_(variant_.mask),
          dropout_(variant_.score.dropout), head_k_(task.first_head / (p_.num_heads / p_.num_heads_k)),
          num_panels_(ceil_div(rows_.count, kPanel)) {}

    void run() {
        load_queries();
        // Key tiles start at multiples of a dropout block.
        for (int key0 = round_down(task_.key_begin, kDropoutBlockKeys); key0 < task_.key_end; key0 += kKeyTile) {
            tile_ = {key0, min(key0 + kKeyTile, task_.key_end)};
            load_keys();
            for (int panel = 0; panel < num_panels_; ++panel) add_tile(panel);
        }
        for (int panel = 0; panel < num_panels_; ++panel) task_.partial ? write_partial(panel) : write_out(panel);
    }

private:
    Range panel_rows(int panel) const { return {panel * kPanel, min(rows_.count, (panel + 1) * kPanel)}; }

    void load_queries() {
        collect_query_rows<E>(p_.q, task_.batch, seq_.first_row_q, rows_, b_.rows);
        const int depth = PackE::depth_of(p_.head_dim);
        for (int panel = 0; panel < num_panels_; ++panel)
            PackE::transposed(b_.rows + panel * kPanel, min(kPanel, rows_.count - panel * kPanel), kPanel, p_.head_dim,
                              {b_.q_t + int64_t(panel) * depth * kPanel, kPanel});
        for (int i = 0; i < num_panels_ * kPanel; ++i) {
            const bool is_row = i < rows_.count;
            const int query = rows_.query(is_row ? i : 0);
            const VisibleKeys<int> seen = is_row ? mask_.visible(query) : VisibleKeys<int>::none();
            b_.first_key[i] = seen.first, b_.last_key[i] = seen.last;
            b_.position[i] = mask_.position(query);
            b_.slope[i] = is_row ? T(alibi_slope(p_.score, task_.batch, rows_.head(i))) : T(0);
            b_.row_max[i] = -INFINITY;
            b_.row_sum[i] = b_.nan[i] = 0;
        }
        memset(b_.o_t, 0, sizeof(T) * num_panels_ * kPanel * p_.head_dim_v);
    }

    // Copies K and V to contiguous memory: in place, rows are often a power of two apart and would share cache sets.
    void load_keys() {
        const int count = tile_.end - tile_.begin;
        const int64_t first = seq_.first_row_k + tile_.begin;
        collect_kv_rows<E>(p_.k, p_.paged_kv, task_.batch, first, head_k_, count, b_.rows);
        PackE::rows(b_.rows, count, p_.head_dim, {b_.k, PackE::depth_of(p_.head_dim)});
        collect_kv_rows<E>(p_.v, p_.paged_kv, task_.batch, first, head_k_, count, b_.rows);
        PackE::by_row(b_.rows, count, round_up(count, kDepth), p_.head_dim_v, p_.head_dim_v, {b_.v, p_.head_dim_v});
    }

    // One step of online softmax: the key tile for the queries of one panel.
    void add_tile(int panel) {
        const Range rows = panel_rows(panel), queries = rows_.queries(rows), seen = mask_.kv_range(queries);
        // The part of the tile that this panel sees, in whole pairs; a hidden partner of a visible key is masked.
        const Range part{round_down(max(seen.begin - tile_.begin, 0), kDepth),
                         min(round_up(max(seen.end - tile_.begin, 0), kDepth), tile_.end - tile_.begin)};
        if (part.empty()) return;
        const int vectors = ceil_div(rows.end - rows.begin, L), depth = PackE::depth_of(p_.head_dim);
        gemm_over_head_dim<Dot>(part.end - part.begin, vectors * L, depth, {b_.k + int64_t(part.begin) * depth, depth},
                                {b_.q_t + int64_t(panel) * depth * kPanel, kPanel},
                                {b_.s + part.begin * kPanel, kPanel});
        const bool is_full = mask_.is_full_block(queries, {tile_.begin + part.begin, tile_.begin + part.end});
        if (variant_.modified) modify_scores(rows.begin, part, vectors);
        if (!is_full) mask_scores(rows.begin, part, vectors);
        if (params_.max_logits) find_nan(rows.begin, part, vectors);
        softmax(panel, part, vectors);
        if (dropout_.threshold) drop(rows.begin, part, vectors);
        accumulate(panel, part, vectors, is_full);
    }

    void modify_scores(int row0, Range part, int vectors) {
        for (int key = part.begin; key < part.end; ++key)
            for (int g = 0; g < vectors; ++g) {
                T* s = b_.s + key * kPanel + g * L;
                const IntVec<T> distance = load_lanes<T>(b_.position + row0 + g * L) - IntLane<T>(tile_.begin + key);
                store(s, variant_.transform(load(s), distance, load(b_.slope + row0 + g * L)));
            }
    }

    void mask_scores(int row0, Range part, int vectors) {
        for (int g = 0; g < vectors; ++g) {
            const VisibleKeys<IntVec<T>> seen{load_lanes<T>(b_.first_key + row0 + g * L),
                                              load_lanes<T>(b_.last_key + row0 + g * L)};
            for (int key = part.begin; key < part.end; ++key) {
                T* s = b_.s + key * kPanel + g * L;
                const IntVec<T> keep = seen.keep(splat_int<T>(tile_.begin + key));
                store(s, select<T>(keep, load(s), splat<T>(-INFINITY)));
            }
        }
    }

    void find_nan(int row0, Range part, int vectors) {
        for (int g = 0; g < vectors; ++g) {
            Vec<T> found = load(b_.nan + row0 + g * L);
            for (int key = part.begin; key < part.end; ++key) {
                const Vec<T> s = load(b_.s + key * kPanel + g * L);
                found = select<T>(s == s, found, s);
            }
            store(b_.nan + row0 + g * L, found);
        }
    }

    void softmax(int panel, Range part, int vectors) {
        int g = 0;
        for (; g + kMaxGroup <= vectors; g += kMaxGroup) softmax_group<kMaxGroup>(panel, g, part);
        for (; g < vectors; ++g) softmax_group<1>(panel, g, part);
    }

    // Scores become weights exp2(score - max); factor rescales the previous row sums and O. The tile's weights are
    // summed before they are added to the row sum, for accuracy.
    template <int G> void softmax_group(int panel, int group, Range part) {
        T* s = b_.s + group * L;
        Vec<T> top[G], offset[G], sum[G];
#pragma GCC unroll 4
        for (int x = 0; x < G; ++x) top[x] = splat<T>(-INFINITY);
        for (int key = part.begin; key < part.end; ++key)
#pragma GCC unroll 4
            for (int x = 0; x < G; ++x) top[x] = vmax(top[x], load(s + key * kPanel + x * L));
#pragma GCC unroll 4
        for (int x = 0; x < G; ++x) {
            T *row_max = b_.row_max + panel * kPanel + (group + x) * L,
              *row_sum = b_.row_sum + panel * kPanel + (group + x) * L;
            const Vec<T> old = load(row_max), now = vmax(old, top[x]);
            store(row_max, now);
            // A row that has seen no key yet must not compute inf - inf.
            offset[x] = now == splat<T>(-INFINITY) ? Vec<T>{} : now;
            const Vec<T> factor = exp2((old - offset[x]) * variant_.scale_log2);
            store(b_.factor + (group + x) * L, factor);
            store(row_sum, load(row_sum) * factor);
            sum[x] = Vec<T>{};
        }
        // The max is subtracted before scaling: the largest weight is exactly 1, and a lone key gives exactly v.
        const auto weight = [&](int key, int x) {
            const Vec<T> e = exp2((load(s + key * kPanel + x * L) - offset[x]) * variant_.scale_log2);
            sum[x] += e;
            return e;
        };
        if constexpr (kDepth == 1) {
            for (int key = part.begin; key < part.end; ++key)
#pragma GCC unroll 4
                for (int x = 0; x < G; ++x) store(s + key * kPanel + x * L, weight(key, x));
        } else {
            for (int key = part.begin; key < part.end; key += 2)
#pragma GCC unroll 4
                for (int x = 0; x < G; ++x) {
                    const Vec<T> low = weight(key, x), high = key + 1 < part.end ? weight(key + 1, x) : Vec<T>{};
                    store(b_.p + key / 2 * kPanel + (group + x) * L, pack_pair(low, high));
                }
        }
#pragma GCC unroll 4
        for (int x = 0; x < G; ++x) {
            T* row_sum = b_.row_sum + panel * kPanel + (group + x) * L;
            store(row_sum, load(row_sum) + sum[x]);
        }
    }

    // Dropped weights become 0; row sums include them.
    void drop(int row0, Range part, int vectors) {
        const int first = round_down(part.begin, kDropoutBlockKeys);
        dropout_keep<true>(dropout_, rows_.query(row0), vectors * L, tile_.begin + first, part.end - first,
                           b_.keep + first * kPanel, kPanel);
        for (int key = part.begin; key < part.end; key += kDepth)
            for (int g = 0; g < vectors; ++g) {
                const uint16_t* keep = b_.keep + key * kPanel + g * L;
                Operand* p = b_.p + key / kDepth * kPanel + g * L;
                if constexpr (kDepth == 1) {
                    store(p, keep_only<T>(widen_mask<T>(keep), load(p)));
                } else {
                    store(p, load(p) & pair_mask(keep, keep + kPanel));
                }
            }
    }

    void accumulate(int panel, Range part, int vectors, bool is_full) {
        T* o_t = b_.o_t + int64_t(panel) * p_.head_dim_v * kPanel;
        const int first = part.begin / kDepth, depth = ceil_div(part.end, kDepth) - first;
        const Operand* v = b_.v + int64_t(first) * p_.head_dim_v;
        if (!is_full && holds_nonfinite<Operand>({v, p_.head_dim_v}, depth, p_.head_dim_v)) {
            accumulate_selected(panel, part, vectors, o_t);
            return;
        }
        gemm<Dot, Update::kRescaleAdd, true>(p_.head_dim_v, vectors * L, depth, {v, p_.head_dim_v},
                                             {b_.p + first * kPanel, kPanel}, {o_t, kPanel}, b_.factor);
    }

    // A masked weight is 0, and 0 * NaN is NaN: multiplies only visible pairs.
    void accumulate_selected(int panel, Range part, int vectors, T* o_t) {
        for (int i = 0; i < vectors * L; ++i) {
            const int row = panel * kPanel + i;
            const VisibleKeys<int> seen{int(b_.first_key[row]), int(b_.last_key[row])};
            for (int d = 0; d < p_.head_dim_v; ++d) {
                T sum = 0;
                for (int key = part.begin; key < part.end; ++key)
                    if (seen.keep(tile_.begin + key))
                        sum += unpack_operand(b_.p[key / kDepth * kPanel + i], key % kDepth) *
                               unpack_operand(b_.v[int64_t(key / kDepth) * p_.head_dim_v + d], key % kDepth);
                o_t[d * kPanel + i] = sum + o_t[d * kPanel + i] * b_.factor[i];
            }
        }
    }

    T top(int row) const { return b_.row_max[row] + b_.nan[row]; }

    // out = O / sum and softmax_lse = max + log(sum). For a query without visible keys 0 and the sink, or -infinity.
    void write_out(int panel) {
        const Range rows = panel_rows(panel);
        memset(b_.factor, 0, sizeof(T) * kPanel);
        for (int row = rows.begin; row < rows.end; ++row)
            b_.factor[row - rows.begin] =
                finish_row(params_, task_.batch, seq_.first_row_q + rows_.query(row), rows_.head(row),
                           top(row) * variant_.scale, b_.row_sum[row], variant_.score.dropout_rescale);
        p_.float_results ? write_out_rows<T>(panel) : write_out_rows<E>(panel);
    }
    template <class Result> void write_out_rows(int panel) {
        write_rows(panel, [&](int row) {
            return row_ptr<Result>(params_.out, task_.batch, seq_.first_row_q + rows_.query(row), rows_.head(row));
        });
    }

    // The sums over this chunk of keys.
    void write_partial(int panel) {
        const Partial<T> partial(task_.partial, rows_.count, p_.head_dim_v);
        const Range rows = panel_rows(panel);
        for (int row = rows.begin; row < rows.end; ++row) {
            partial.row_max[row] = top(row);
            partial.row_sum[row] = b_.row_sum[row];
        }
        for (int i = 0; i < kPanel; ++i) b_.factor[i] = 1;
        write_rows(panel, [&](int row) { return partial.row(row); });
    }

    // Writes O * factor, transposed in blocks. target(row): where a row of head_dim_v elements goes.
    template <class Target> void write_rows(int panel, Target target) {
        constexpr int kBlock = 16;
        const T* o_t = b_.o_t + int64_t(panel) * p_.head_dim_v * kPanel;
        const Range rows = panel_rows(panel);
        const int count = rows.end - rows.begin;
        for (int i0 = 0; i0 < count; i0 += kBlock)
            for (int d0 = 0; d0 < p_.head_dim_v; d0 += kBlock) {
                const int columns = min(kBlock, p_.head_dim_v - d0);
                T block[kBlock][kBlock];
                for (int d = 0; d < columns; ++d)
                    for (int i = 0; i < kBlock; ++i) block[i][d] = o_t[(d0 + d) * kPanel + i0 + i] * b_.factor[i0 + i];
                for (int i = i0; i < min(i0 + kBlock, count); ++i) {
                    auto* out = target(rows.begin + i) + d0;
                    for_each_vector<T>(columns, [&](int d, int n) { store_some(out + d, load(block[i - i0] + d), n); });
                }
            }
    }

    const FwdParams& params_;
    const Problem& p_;
    const FwdTask task_;
    const TileRows rows_;
    const Buffers b_;
    const Sequence seq_;
    const HeadVariant<T> variant_;
    const RangeMask& mask_;
    const DropoutMask& dropout_;
    const int head_k_, num_panels_;
    Range tile_{0, 0};  // the key tile in b_.k and b_.v
};

}  // namespace flash_attn::cpu::FA_ISA
