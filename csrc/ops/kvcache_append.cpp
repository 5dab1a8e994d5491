// Appending to a KV cache with torch operations: what csrc/cpu/append.h does row by row.
#include "ops/kvcache_append.h"
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

namespace flash_attn {
namespace {

Tensor count_to(int64_t end, const Tensor& like) { return at::arange(end, like.options().dtype(at::kLong)); }

// Rows in the cache before appending: [batch_size, 1].
Tensor lengths_of(const KvCacheArgs& args) {
    if (args.cache_seqlens) return args.cache_seqlens->to(at::kLong).unsqueeze(1);
    return at::full({args.k->size(0), 1}, args.cache_seqlen->expect_int(), args.k->options().dtype(at::kLong));
}

// [batch_size, seqlen_new]
Tensor new_positions(const KvCacheArgs& args, const Tensor& lengths) {
    return lengths.add(count_to(args.k->size(1), lengths));
}

// Copies x [batch_size, seqlen, heads, head_dim], its first rotary_dim elements rotated by the angles of `positions`
// [batch_size, seqlen or 1] and rounded once. A position outside the tables takes the nearest row.
Tensor rotate(const KvCacheArgs& args, const Tensor& x, const Tensor& positions) {
    const Tensor rows = positions.clamp(0, args.rotary_cos->size(0) - 1);
    const at::ScalarType compute_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto at_rows = [&](const Tensor& table) {  // [batch_size, seqlen or 1, 1, rotary_dim / 2]
        return table.index_select(0, rows.flatten()).unflatten(0, rows.sizes()).unsqueeze(2).to(compute_type);
    };
    const int64_t pairs = args.rotary_cos->size(1);
    const auto half = [&](const Tensor& t, int64_t i) {
        return args.rotary_interleaved ? t.slice(-1, i, 2 * pairs, 2) : t.narrow(-1, i * pairs, pairs);
    };
    const Tensor cos = at_rows(*args.rotary_cos), sin = at_rows(*args.rotary_sin);
    const Tensor a = half(x, 0).to(compute_type), b = half(x, 1).to(compute_type);
    const Tensor rotated = x.clone();
    half(rotated, 0).copy_(a.mul(cos).sub(b.mul(sin)));
    half(rotated, 1).copy_(a.mul(sin).add(b.mul(cos)));
    return rotated;
}

Tensor rotated_queries(const KvCacheArgs& args, const Tensor& lengths) {
    if (args.q.numel() == 0) return args.q;
    const Tensor first = lengths.clamp_min(0);
    if (!args.queries_advance()) return rotate(args, args.q, first);
    return rotate(args, args.q, first.add(count_to(args.q.size(1), first)));
}

// Which rows are written, and where to. Every tensor has batch_size * seqlen_new elements; any_valid has one.
//
// The number of valid rows is known on the device only, so all rows are written. One that must not be is replaced by
// the first valid one, which writes the same bits to the same place twice. Without any, row 0 of entry 0 is written as
// it was.
struct Destinations { Tensor new_rows, entries, rows, any_valid; };

Destinations destinations(const KvCacheArgs& args, const Tensor& lengths) {
    const int64_t num_entries = args.k_cache.size(0), page_size = args.k_cache.size(1);
    const OptionalTensor given = args.attention().block_table;
    const Tensor table = given ? *given : count_to(args.k->size(0), lengths).unsqueeze(1);  // [batch_size, max_pages]
    const Tensor positions = new_positions(args, lengths);
    const Tensor pages = positions.floor_divide(page_size);
    const Tensor entries = table.gather(1, pages.clamp(0, table.size(1) - 1)).to(at::kLong);
    const Tensor is_valid = lengths.ge(0)
                                .logical_and(pages.lt(table.size(1)))
                                .logical_and(entries.ge(0))
                                .logical_and(entries.lt(num_entries))
                                .flatten();
    const Tensor any_valid = is_valid.any();
    const Tensor first_valid = is_valid.to(at::kInt).argmax();  // the first of the largest
    const Tensor new_rows = at::where(is_valid, count_to(is_valid.size(0), lengths), first_valid);
    const auto valid = [&](const Tensor& t) { return t.flatten().index_select(0, new_rows).mul(any_valid); };
    return {new_rows, valid(entries), valid(positions.remainder(page_size)), any_valid};
}

void write(Tensor cache, const Tensor& new_rows, const Destinations& to) {
    const Tensor valid_rows = new_rows.flatten(0, 1).index_select(0, to.new_rows), as_it_was = cache[0][0];
    cache.index_put_({to.entries, to.rows}, at::where(to.any_valid, valid_rows, as_it_was));
}

}  // namespace

Tensor append_with_torch(const KvCacheArgs& args) {
    if (!args.k) return args.q;
    const Tensor lengths = lengths_of(args);
    const bool rotates = args.rotary_cos.has_value();
    Tensor q = rotates ? rotated_queries(args, lengths) : args.q;
    if (args.k->numel() == 0 || args.k_cache.numel() == 0 || capacity_of(args) == 0) return q;
    const Tensor k = rotates ? rotate(args, *args.k, new_positions(args, lengths)) : *args.k;
    const Destinations to = destinations(args, lengths);
    write(args.k_cache, k, to);
    if (!args.values_are_keys()) write(args.v_cache, *args.v, to);
    return q;
}

namespace {

// For tests: appends, and does nothing else.
Tensor append(const KvCacheArgs& args) {
    validate(args);
    Tensor q = append_with_torch(args);
    return q.is_same(args.q) ? q.clone() : q;
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) { m.impl("_append", KvCacheOps::run<append>); }

}  // namespace flash_attn
