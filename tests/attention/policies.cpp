// The policies of csrc/policy/ as C functions, for test_mask.py.
#include <cstdint>

#include "policy/dropout.h"
#include "policy/mask.h"
#include "policy/paged_kv.h"
#include "policy/seqlen.h"

using namespace flash_attn;

namespace {

WindowMask make_mask(const int32_t* m) {
    Sequence s{};
    s.seqlen_q = m[0], s.seqlen_k = m[1];
    s = placed(s, {m[5] != 0, nullptr, nullptr, m[6], m[7]}, 0);
    Problem p{};
    p.window = {m[2], m[3]};
    p.chunks = make_chunks(m[4]);
    return WindowMask::of(p, s, 0, 0);
}

// The same, computed with the bounds of the key (kByKey).
bool keep_by_key(const WindowMask& mask, int row, int key) {
    return !mask.hides<Edge::kAfter, true>(row, key) && !mask.hides<Edge::kBefore, true>(row, key);
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
