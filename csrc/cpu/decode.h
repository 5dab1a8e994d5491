// Forward pass of tiles of few rows, as in decoding: bound by the speed at which keys and values arrive from memory, so
// each is read once, in place, for all rows. Scores are dot products of a key and a query, with vector lanes along
// head_dim, whose sums turn into lanes along keys; softmax has lanes along keys, and sums of values along head_dim_v.
#pragma once
#include "cpu/lanes.h"
#include "cpu/merge.h"
#include "cpu/row_vectors.h"
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

constexpr int kDecodeBlock = 32;  // keys of one step of online softmax

// What the tiles of a task share: where the rows of a block of keys are, and the memory of one step.
template <class E, class Dot> struct DecodeBlock {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    static constexpr int kPairs = kDecodeBlock / Dot::kDepth;

    // [kDecodeBlock]: offsets of rows of head 0, in this block and in the next. After the last key, the last row again.
    int64_t *k_offset, *v_offset, *next_k_offset, *next_v_offset;
    int64_t* shared_offset;  // [kDecodeBlock]: of values that all rows of a tile see, and of zeros
    E* zeros;                // [head_dim_v]
    T* s;                    // [kDecodeRows][kDecodeBlock]
    Operand* weights;        // [kDecodeRows][kPairs]: of the keys, or of the pairs (i, i + kPairs)
    Range keys{0, 0};

    DecodeBlock(Arena& arena, const Problem& p) {
        for (int64_t** each : {&k_offset, &v_offset, &next_k_offset, &next_v_offset, &shared_offset})
            *each = arena.take<int64_t>(kDecodeBlock);
        zeros = arena.take<E>(p.head_dim_v);
        s = arena.take<T>(kDecodeRows * kDecodeBlock);
        if constexpr (Dot::kDepth == 1)
            weights = s;
        else
            weights = arena.take<Operand>(kDecodeRows * kPairs);
    }

    // Looks up the block after `keys`, up to key `end`; after the last one, nothing is left to fetch but this one.
    void look_up_next(const Problem& p, const Sequence& seq, int batch, int end) {
        const int count = min(kDecodeBlock, end - keys.end);
        if (count <= 0) {
            memcpy(next_k_offset, k_offset, sizeof(int64_t) * kDecodeBlock);
            memcpy(next_v_offset, v_offset, sizeof(int64_t) * kDecodeBlock);
            return;
        }
        look_up(p.k, p, batch, seq.first_row_k + keys.end, count, next_k_offset);
        look_up(p.v, p, batch, seq.first_row_k + keys.end, count, next_v_offset);
    }
    void move_on(int end) {
        std::swap(k_offset, next_k_offset);
        std::swap(v_offset, next_v_offset);
        keys = {keys.end, min(keys.end + kDecodeBlock, end)};
    }
    // The values in part of the block, zeros elsewhere. first: row 0 of the head.
    const int64_t* values_in(Range part, const E* first) {
        if (part.begin == 0 && part.end == kDecodeBlock) return v_offset;
        const int64_t to_zeros =
            (reinterpret_cast<intptr_t>(zeros) - reinterpret_cast<intptr_t>(first)) / int64_t(sizeof(E));
        for (int i = 0; i < kDecodeBlock; ++i)
            shared_offset[i] = i < part.begin || i >= part.end ? to_zeros : v_offset[i];
        return shared_offset;
    }

private:
    static void look_up(const TensorView& t, const Problem& p, int batch, int64_t row, int count, int64_t* offset) {
        if (!p.paged_kv.block_table) {
            for (int i = 0; i < count; ++i) offset[i] = batch * t.batch_stride + (row + i) * t.row_stride;
        } else {
            for (int i = 0; i < count; ++i) offset[i] = kv_row_offset(t, p.paged_kv, batch, row + i);
        }
        for (int i = count; i < kDecodeBlock; ++i) offset[i] = offset[count - 1];
    }
};

template <class E, class Dot> class DecodeTile {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    using Rows = RowVectors<E, Dot>;
    using Block = DecodeBlock<E, Dot>;
    using Products = DotProducts<E, Dot>;
    static constexpr int L = kLanes<T>, kBlock = kDecodeBlock, kPairs = Block::kPairs;
    static constexpr int kStep = Rows::kElements;  // elements of V in one vector
    static constexpr int kSums = kStep / L;        // vectors of sums that they are added to
    static constexpr int kAccumulators = Products::kAccumulators;

    struct Buffers {
        Operand* q;                            // [row][head_dim / kDepth, padded], in the order of RowVectors
        T* o;                                  // [row][head_dim_v, padded], as RowVectors sums rows
        T *row_max, *factor, *slope;           // [row]
        T* nan;                                // [row]: NaN once a score is, which row_max may lose; else 0
        T* row_sum;                            // [row][L]: of the weights in each lane
        int *position, *first_key, *last_key;  // [row]: on the axis of keys; visible keys
        int q_stride, o_stride;

        Buffers(Arena& arena, const Problem& p, int rows)
            : q_stride(Rows::count_of(p.head_dim) * L), o_stride(round_up(p.head_dim_v, kStep)) {
            q = arena.take<Operand>(int64_t(rows) * q_stride);
            o = arena.take<T>(int64_t(rows) * o_stride);
            for (T** each : {&row_max, &factor, &slope, &nan}) *each = arena.take<T>(rows);
            row_sum = arena.take<T>(int64_t(rows) * L);
            for (int** each : {&position, &first_key, &last_key}) *each = arena.take<int>(rows);
        }
    };

public:
    // Runs the tiles of a task together, block by block: so the heads of a key are read one after the other.
    static void run(const FwdParams& params, const FwdTask& task, Arena arena) {
        const Problem& p = params.problem;
        Block block(arena, p);
        memset(block.zeros, 0, sizeof(E) * p.head_dim_v);
        DecodeTile* const tiles = arena.take<DecodeTile>(kDecodeTiles);
        for (int i = 0; i < task.num_tiles; ++i) new (tiles + i) DecodeTile(params, tile_of(task, i), block, arena);
        block.keys = {task.key_begin, task.key_begin};
        block.look_up_next(p, tiles->seq_, task.batch, task.key_end);
        while (block.keys.end < task.key_end) {
            block.move_on(task.key_end);
            block.look_up_next(p, tiles->seq_, task.batch, task.key_end);
            for (int i = 0; i < task.num_tiles; ++i) {
                const bool is_last = i + 1 == task.num_tiles;
                tiles[i].add_block(is_last ? tiles[0].in_next_block() : tiles[i + 1].here());
            }
        }
        for (int i = 0; i < task.num_tiles; ++i) tiles[i].write();
    }
    static size_t scratch_bytes(const FwdParams& params) {
        Arena counter(nullptr);
        Block(counter, params.problem);
        counter.take<DecodeTile>(kDecodeTiles);
        for (int i = 0; i < kDecodeTiles; ++i) Buffers(counter, params.problem, kDecodeTaskRows / kDecodeTiles);
        return counter.used();
    }

private:
    DecodeTile(const FwdParams& params, const FwdTask& task, Block& block, Arena& arena)
        : params_(params), p_(params.problem), task_(task), rows_(task), block_(block), b_(arena, p_, rows_.count),
          seq_(sequence_at(p_, task.batch)), variant_(p_, seq_, task.batch, task.first_head), k_(first_row(p_.k)),
          v_(first_row(p_.v)) {
        load_rows();
    }

    // Row 0 of the key head.
    const E* first_row(const TensorView& t) const {
        return static_cast<const E*>(t.data) + task_.first_head / (p_.num_heads / p_.num_heads_k) * t.head_stride;
    }
    void load_rows() {
        const E* q_rows[kDecodeRows];
        collect_query_rows<E>(p_.q, task_.batch, seq_.first_row_q, rows_, q_rows);
        for (int row = 0; row < rows_.count; ++row) Rows::pack(q_rows[row], p_.head_dim, b_.q + row * b_.q_stride);
        memset(b_.o, 0, sizeof(T) * rows_.count * b_.o_stride);
        shared_ = {task_.key_begin, task_.key_end};
        for (int row = 0; row < rows_.count; ++row) {
            const int query = rows_.query(row);
            const VisibleKeys<int> seen = variant_.mask.visible(query);
            b_.first_key[row] = seen.first, b_.last_key[row] = seen.last;
            shared_ = {max(shared_.begin, seen.first), min(shared_.end, seen.last + 1)};
            b_.position[row] = variant_.mask.position(query);
            b_.slope[row] = alibi_slope(p_.score, task_.batch, rows_.head(row));
            b_.row_max[row] = -INFINITY;
            b_.nan[row] = 0;
            store(b_.row_sum + row * L, Vec<T>{});
        }
    }

    // The keys and values of a block.
    struct KeyRows { RowsInPlace<E> k, v; };
    KeyRows here() const { return {{k_, block_.k_offset}, {v_, block_.v_offset}}; }
    KeyRows in_next_block() const { return {{k_, block_.next_k_offset}, {v_, block_.next_v_offset}}; }

    // Meanwhile fetches what the task reads next: the rows of the same keys for the next tile, or of the next keys.
    void add_block(const KeyRows& fetched) {
        fetched_ = fetched;
        keys_ = block_.keys;
        const int count = keys_.end - keys_.begin, begin = clamp(shared_.begin - keys_.begin, 0, count);
        all_ = {begin, clamp(shared_.end - keys_.begin, begin, count)};
        values_ = block_.values_in(all_, v_);
        Products::multiply(rows_.count, count, p_.head_dim, {b_.q, b_.q_stride}, here().k, fetched_.k,
                           {block_.s, kBlock});
        for (int row = 0; row < rows_.count; ++row) softmax(row);
        int row = 0;
        for (; row + 4 <= rows_.count; row += 4) add_values<4>(row);
        for (; row + 2 <= rows_.count; row += 2) add_values<2>(row);
        for (; row < rows_.count; ++row) add_values<1>(row);
    }

    // Scores become weights exp2(score - max); factor rescales the previous sum and O.
    void softmax(int row) {
        T* const s = block_.s + row * kBlock;
        const int count = keys_.end - keys_.begin, padded = round_up(count, L);
        if (variant_.modified) modify_scores(row, s, padded);
        const VisibleKeys<int> seen{b_.first_key[row] - keys_.begin, min(b_.last_key[row] - keys_.begin, count - 1)};
        if (seen.first > 0 || seen.last < padded - 1) mask_scores(seen, s, padded);
        if (params_.max_logits) find_nan(row, s, padded);
        Vec<T> top = splat<T>(-INFINITY), sum{};
        for (int i = 0; i < padded; i += L) top = vmax(top, load(s + i));
        const T old = b_.row_max[row];
        const T now = any_above(top, old) ? lane_max(vmax(splat<T>(old), top)) : old;
        // A row that has seen no key yet must not compute inf - inf.
        const T offset = now == T(-INFINITY) ? T(0) : now;
        b_.row_max[row] = now;
        b_.factor[row] = now == old ? T(1) : exp2(splat<T>((old - offset) * variant_.scale_log2))[0];
        // The max is subtracted before scaling: the largest weight is exactly 1, and a lone key gives exactly v.
        for (int i = 0; i < padded; i += L) {
            const Vec<T> weight = exp2((load(s + i) - offset) * variant_.scale_log2);
            sum += weight;
            store(s + i, weight);
        }
        store(b_.row_sum + row * L, load(b_.row_sum + row * L) * b_.factor[row] + sum);
        if constexpr (Dot::kDepth == 2) {
            for (int i = padded; i < kBlock; i += L) store(s + i, Vec<T>{});
            for (int i = 0; i < kPairs; i += L)
                store(block_.weights + row * kPairs + i, pack_pair(load(s + i), load(s + kPairs + i)));
        }
    }
    void modify_scores(int row, T* s, int padded) {
        const Vec<T> slope = splat<T>(b_.slope[row]);
        for (int i = 0; i < padded; i += L) {
            const IntVec<T> distance = IntLane<T>(b_.position[row] - keys_.begin - i) - lane_index<T>();
            store(s + i, variant_.transform(load(s + i), distance, slope));
        }
    }
    void mask_scores(VisibleKeys<int> seen, T* s, int padded) {
        const VisibleKeys<IntVec<T>> lanes{splat_int<T>(seen.first), splat_int<T>(seen.last)};
        for (int i = 0; i < padded; i += L) {
            const IntVec<T> keep = lanes.keep(lane_index<T>() + IntLane<T>(i));
            store(s + i, select<T>(keep, load(s + i), splat<T>(-INFINITY)));
        }
    }
    void find_nan(int row, const T* s, int padded) {
        for (int i = 0; i < padded; ++i)
            if (s[i] != s[i]) b_.nan[row] = s[i];
    }

    // O = O * factor + P V for kRows rows. Fetches other values. Keys that only some of the rows see
    // are not multiplied by weights of 0, for 0 * NaN is NaN: they are added row by row.
    template <int kRows> void add_values(int row) {
        add_all_columns<kRows, kAccumulators / kRows>(row, 0);
        for (int r = row; r < row + kRows; ++r) {
            add_seen(r, {0, all_.begin});
            add_seen(r, {all_.end, keys_.end - keys_.begin});
        }
    }
    // Columns from d on, as many at a time as there are accumulators for.
    template <int kRows, int kVectors> void add_all_columns(int row, int d) {
        for (; d + kVectors * L <= p_.head_dim_v; d += kVectors * L)
            add_columns<kRows, kVectors>(row, d, std::integral_constant<int, kStep>());
        if constexpr (kVectors > kSums)
            add_all_columns<kRows, kVectors / 2>(row, d);
        else if (d < p_.head_dim_v)
            add_columns<kRows, kVectors>(row, d, p_.head_dim_v - d);
    }
    template <int kRows, int kVectors, class Count> void add_columns(int row, int d, Count count) {
        Vec<T> acc[kRows][kVectors] = {};
        const Operand* const weights = block_.weights + row * kPairs;
        const RowsInPlace<E> fetched = row == 0 ? fetched_.v : here().v;
        const int num_pairs = min(kPairs, keys_.end - keys_.begin);
        for (int i = 0; i < num_pairs; ++i) {
            Vec<Operand> w[kRows];
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) w[m] = splat<Operand>(weights[m * kPairs + i]);
            const auto add = [&](int n, Vec<Operand> x) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m) acc[m][n] = Dot::multiply_add(acc[m][n], w[m], x);
            };
            const E *const v = v_ + values_[i] + d, *const next = fetched.row(i) + d;
            if constexpr (Dot::kDepth == 1) {
#pragma GCC unroll 16
                for (int n = 0; n < kVectors; ++n) {
                    if (n % kSums == 0) __builtin_prefetch(next + n * L);
                    add(n, Rows::operand(v + n / kSums * kStep, n % kSums, count));
                }
            } else {
                const E* const partner = v_ + values_[i + kPairs] + d;
                const E* const next_partner = fetched.row(i + kPairs) + d;
#pragma GCC unroll 8
                for (int n = 0; n < kVectors; n += 2) {
                    const Vec<Operand> x = Rows::operand(v + n * L, 0, count),
                                       y = Rows::operand(partner + n * L, 0, count);
                    __builtin_prefetch(next + n * L);
                    __builtin_prefetch(next_partner + n * L);
                    add(n, interleave<0, uint16_t>(x, y));
                    add(n + 1, interleave<1, uint16_t>(x, y));
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
            for (int n = 0; n < kVectors; ++n) {
                T* const o = b_.o + (row + m) * b_.o_stride + d + n * L;
                store(o, load(o) * b_.factor[row + m] + acc[m][n]);
            }
    }
    // Adds the keys of a part of the block that the row sees, one by one.
    void add_seen(int row, Range part) {
        T* const o = b_.o + row * b_.o_stride;
        for (int key = part.begin; key < part.end; ++key) {
            if (keys_.begin + key < b_.first_key[row] || keys_.begin + key > b_.last_key[row]) continue;
            Rows::add_scaled(block_.s[row * kBlock + key], v_ + block_.v_offset[key], p_.head_dim_v, o);
        }
    }

    void write() {
        for (int row = 0; row < rows_.count; ++row) {
            Rows::restore_order(b_.o + row * b_.o_stride, p_.head_dim_v);
            task_.partial ? write_partial(row) : write_out(row);
        }
    }
    T top(int row) const { return b_.row_max[row] + b_.nan[row]; }
    void write_out(int row) {
        const int64_t query = seq_.first_row_q + rows_.query(row);
        const T inverse = finish_row(params_, task_.batch, query, rows_.head(row), top(row) * variant_.scale,
                                     lane_sum(load(b_.row_sum + row * L)), T(1));
        with_result_row<E>(p_, params_.out, task_.batch, query, rows_.head(row), [&](auto* out) {
            for_each_vector<T>(p_.head_dim_v, [&](int d, int count) {
                store_some(out + d, load(b_.o + row * b_.o_stride + d) * inverse, count);
            });
        });
    }
    void write_partial(int row) {
        const Partial<T> partial(task_.partial, rows_.count, p_.head_dim_v);
        partial.row_max[row] = top(row);
        partial.row_sum[row] = lane_sum(load(b_.row_sum + row * L));
        memcpy(partial.row(row), b_.o + row * b_.o_stride, sizeof(T) * partial.stride);
    }

    const FwdParams& params_;
    const Problem& p_;
    const FwdTask task_;
    const TileRows rows_;
    Block& block_;
    const Buffers b_;
    const Sequence seq_;
    const HeadVariant<T> variant_;
    const E *const k_, *const v_;      // row 0 of the key head
    Range shared_{0, 0};               // the keys that all rows see
    Range keys_{0, 0};                 // the block
    Range all_{0, 0};                  // the part of the block that all rows see, from its start
    KeyRows fetched_{};                // fetched meanwhile
    const int64_t* values_ = nullptr;  // [kBlock]: offsets of the values of that part
};

}  // namespace flash_attn::cpu::FA_ISA
