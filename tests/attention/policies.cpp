// The policies of csrc/policy/ as C functions, for test_mask.py and test_lengths.py.
#include <cstdint>
#include <vector>

#include "cpu/range_blocks.h"
#include "policy/dropout.h"
#include "policy/mask.h"
#include "policy/paged_kv.h"
#include "policy/range_mask.h"
#include "policy/seqlen.h"

using namespace flash_attn;

namespace {

Problem make_problem(const int32_t* m) {
    Problem p{};
    p.seqlens.seqlen_q = m[0], p.seqlens.seqlen_k = m[1];
    p.window = {m[2], m[3]};
    p.chunks = make_chunks(m[4]);
    p.positions = {m[5] != 0, nullptr, nullptr, m[6], m[7]};
    return p;
}

WindowMask make_mask(const int32_t* m) {
    const Problem p = make_problem(m);
    return WindowMask::of(p, sequence_at(p, 0), 0, 0);
}

// Key blocks are made for no more keys than this: without them, q_range() must not be asked.
constexpr int kMostKeys = 1 << 20;

// A mask with the range of every query, and the summaries of its ranges.
struct RangeMaskOf {
    std::vector<QueryBlock> query_blocks;
    std::vector<KeyBlock> key_blocks;
    RangeMask mask;

    RangeMaskOf(const int32_t* m, const int32_t* ranges) {
        Problem p = make_problem(m);
        query_blocks.resize(RangeMask::num_query_blocks(p));
        if (p.seqlens.seqlen_k <= kMostKeys) key_blocks.resize(RangeMask::num_key_blocks(p));
        p.key_ranges = {ranges, 0, query_blocks.data(), key_blocks.data()};
        mask = RangeMask::of(p, sequence_at(p, 0), 0, 0);
        for (int i = 0; i < RangeMask::num_query_blocks(p); ++i) query_blocks[i] = cpu::query_block(mask, i);
        for (int i = 0; i < int(key_blocks.size()); ++i) key_blocks[i] = cpu::key_block(mask, i);
    }
};

// The same, computed with the bounds of the key (kByKey).
template <class Mask> bool keep_by_key(const Mask& mask, int row, int key) {
    return !mask.template hides<Edge::kAfter, true>(row, key) && !mask.template hides<Edge::kBefore, true>(row, key);
}

// 0 or 1; 2 if two ways to compute it disagree.
uint8_t agreed(bool a, bool b) { return a == b ? a : 2; }

}  // namespace

extern "C" {

// A mask is eight numbers: seqlen_q, seqlen_k, left, right, the chunk size (0: no chunks), whether positions are given,
// q_start and k_start.
uint8_t mask_keep(const int32_t* mask, int row, int key) {
    return agreed(make_mask(mask).keep(row, key), keep_by_key(make_mask(mask), row, key));
}

void mask_kv_range(const int32_t* mask, int begin, int end, int32_t* out) {
    const Range keys = make_mask(mask).kv_range({begin, end});
    out[0] = keys.begin, out[1] = keys.end;
}

void mask_q_range(const int32_t* mask, int begin, int end, int32_t* out) {
    const Range rows = make_mask(mask).q_range({begin, end});
    out[0] = rows.begin, out[1] = rows.end;
}

uint8_t mask_is_full_block(const int32_t* mask, int row_begin, int row_end, int key_begin, int key_end) {
    const WindowMask m = make_mask(mask);
    const Range rows{row_begin, row_end}, keys{key_begin, key_end};
    return agreed(m.is_full_block(rows, keys), m.is_full_block<true>(rows, keys));
}

// Results for all rows and keys, and for all ranges begin < end, ordered by begin, then end.
void mask_tables(const int32_t* m, uint8_t* keep, int32_t* kv_range, int32_t* q_range, uint8_t* is_full_block) {
    const WindowMask mask = make_mask(m);
    for (int row = 0; row < mask.seqlen_q; ++row)
        for (int key = 0; key < mask.seqlen_k; ++key)
            *keep++ = agreed(mask.keep(row, key), keep_by_key(mask, row, key));
    for (int begin = 0; begin < mask.seqlen_q; ++begin)
        for (int end = begin + 1; end <= mask.seqlen_q; ++end, kv_range += 2) mask_kv_range(m, begin, end, kv_range);
    for (int begin = 0; begin < mask.seqlen_k; ++begin)
        for (int end = begin + 1; end <= mask.seqlen_k; ++end, q_range += 2) mask_q_range(m, begin, end, q_range);
    for (int a = 0; a < mask.seqlen_q; ++a)
        for (int b = a + 1; b <= mask.seqlen_q; ++b)
            for (int c = 0; c < mask.seqlen_k; ++c)
                for (int d = c + 1; d <= mask.seqlen_k; ++d)
                    *is_full_block++ =
                        agreed(mask.is_full_block({a, b}, {c, d}), mask.is_full_block<true>({a, b}, {c, d}));
}

// With the range of each query. keep: of all rows and the given keys; visible: first and last key of each row.
void ranges_keep(const int32_t* m, const int32_t* ranges, const int32_t* keys, int num_keys, uint8_t* keep,
                 int32_t* visible) {
    const RangeMaskOf with(m, ranges);
    for (int row = 0; row < m[0]; ++row, visible += 2) {
        const VisibleKeys<int> seen = with.mask.visible(row);
        visible[0] = seen.first, visible[1] = seen.last;
        for (int i = 0; i < num_keys; ++i)
            *keep++ =
                agreed(agreed(with.mask.keep(row, keys[i]), with.mask.keep<true>(row, keys[i])), seen.keep(keys[i]));
    }
}

// Of spans (begin, end) of rows and of keys. is_full_block: of each span of rows with each of keys.
void ranges_of_spans(const int32_t* m, const int32_t* ranges, const int32_t* rows, int num_rows, const int32_t* keys,
                     int num_keys, int32_t* kv_range, int32_t* q_range, uint8_t* is_full_block) {
    const RangeMaskOf with(m, ranges);
    for (int i = 0; i < num_rows; ++i, kv_range += 2) {
        const Range seen = with.mask.kv_range({rows[2 * i], rows[2 * i + 1]});
        kv_range[0] = seen.begin, kv_range[1] = seen.end;
    }
    for (int i = 0; i < num_keys && !with.key_blocks.empty(); ++i, q_range += 2) {
        const Range seen = with.mask.q_range({keys[2 * i], keys[2 * i + 1]});
        q_range[0] = seen.begin, q_range[1] = seen.end;
    }
    for (int i = 0; i < num_rows; ++i)
        for (int j = 0; j < num_keys; ++j) {
            const Range block_rows{rows[2 * i], rows[2 * i + 1]}, block_keys{keys[2 * j], keys[2 * j + 1]};
            *is_full_block++ = agreed(with.mask.is_full_block(block_rows, block_keys),
                                      with.mask.is_full_block<true>(block_rows, block_keys));
        }
}

// sizes: total_q, total_k, seqlen_q, seqlen_k, max_pages, num_pages, page_size, seqlen_new. block_table only says
// whether keys are paged.
void sequence(const int32_t* cu_q, const int32_t* cu_k, const int32_t* seqused_k, const int32_t* leftpad_k,
              const int32_t* block_table, const int32_t* sizes, int batch, int64_t* out) {
    Problem p{};
    p.seqlens = {cu_q, cu_k, seqused_k, leftpad_k, sizes[0], sizes[1], sizes[2], sizes[3], sizes[7]};
    p.paged_kv = {block_table, sizes[4], sizes[4], sizes[5], sizes[6]};
    const Sequence s = sequence_at(p, batch);
    out[0] = s.first_row_q, out[1] = s.seqlen_q, out[2] = s.first_row_k, out[3] = s.seqlen_k;
}

int64_t row_offset(const int64_t* strides, const int32_t* block_table, const int32_t* sizes, int batch, int64_t row) {
    const TensorView view{nullptr, strides[0], strides[1], strides[2]};
    return kv_row_offset(view, {block_table, sizes[0], sizes[0], sizes[1], sizes[2]}, batch, row);
}

void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
    const PhiloxOutput words = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}

// heads: how many there are, then, of a shard, those before it and all that are not in it. starts: q_start, k_start.
void drops(uint32_t threshold, uint64_t seed, uint64_t offset, int batch, int head, const int32_t* heads,
           const int32_t* starts, int rows, int keys, uint8_t* out) {
    Problem p{};
    p.num_heads = heads[0];
    p.dropout = {threshold, seed, offset, nullptr, heads[1], heads[2]};
    const Sequence s = placed({0, 0, rows, keys, 0, 0, 0}, {true, nullptr, nullptr, starts[0], starts[1]}, batch);
    const DropoutMask mask(p, s, batch, head);
    for (int row = 0; row < rows; ++row)
        for (int key = 0; key < keys; ++key) *out++ = mask.drops(uint32_t(row), uint32_t(key));
}

double rescale(uint32_t threshold) { return dropout_rescale({threshold, 0, 0, nullptr, 0, 0}); }
}
