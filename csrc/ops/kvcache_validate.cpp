// The checks of fwd_kvcache: of shapes and numbers, and of values in host memory.
#include <ATen/MemoryOverlap.h>
#include <c10/util/irange.h>
#include <algorithm>
#include <vector>
#include "ops/checks.h"
#include "ops/kvcache.h"
#include "policy/split.h"

namespace flash_attn {
namespace {

std::string most_rows(const c10::SymInt& capacity, const c10::SymInt& seqlen_new) {
    if (known(seqlen_new.sym_eq(0))) return c10::str("at most ", capacity, ", the capacity of the cache");
    return c10::str("at most ", capacity - seqlen_new, ", for ", seqlen_new, " rows are appended and the cache has ",
                    capacity);
}

// Whether the caches share memory, but for values that are leading columns of keys. Of tensors with holes nobody knows.
bool overlap(const KvCacheArgs& args) {
    return !args.k_cache.is_meta() &&
           at::get_overlap_status(args.k_cache, args.v_cache) == at::MemOverlapStatus::Partial;
}

class KvCacheValidator : public Checks {
public:
    explicit KvCacheValidator(const KvCacheArgs& args)
        : Checks(Pass::kCache, /*packed=*/false, args.q), args_(args), capacity_(capacity_of(args)) {}

    void check() {
        check_types_and_devices();
        check_q();
        check_caches();
        check_heads("k_cache", num_heads_, num_heads_k_);
        check_new_rows();
        check_rotary();
        check_lengths();
        check_numbers();
        check_alibi_slopes(args_.alibi_slopes, batch_size_, num_heads_);
        check_sinks(args_.s_aux, num_heads_);
    }

private:
    void check_types_and_devices() {
        const at::ScalarType type = args_.q.scalar_type();
        if (!is_supported(type)) reasons_.add("q", "dtype float32, float64, bfloat16 or float16", dtype_name(type));
        const auto check_like_q = [&](const char* name, const Tensor& t) {
            check_device(name, t);
            check_dtype(name, t, type);
        };
        check_like_q("k_cache", args_.k_cache);
        check_like_q("v_cache", args_.v_cache);
        if (args_.k) check_like_q("k", *args_.k);
        if (args_.v) check_like_q("v", *args_.v);
        if (args_.rotary_cos) check_like_q("rotary_cos", *args_.rotary_cos);
        if (args_.rotary_sin) check_like_q("rotary_sin", *args_.rotary_sin);
    }
    void check_q() {
        const Tensor& q = args_.q;
        if (!check_shape("q", q, {{"batch_size"}, {"seqlen_q"}, {"num_heads"}, {"head_dim"}})) return;
        batch_size_ = q.sym_size(0), seqlen_q_ = q.sym_size(1), num_heads_ = q.sym_size(2), head_dim_ = q.sym_size(3);
        check_count("q", "batch_size", batch_size_);
        check_count("q", "seqlen_q", seqlen_q_);
        check_head_dim("q", "head_dim", head_dim_, kMaxCacheHeadDim);
    }
    void check_caches() {
        const bool paged = args_.block_table.has_value(), any_entry = paged || args_.cache_batch_idx;
        const char *first = paged ? "num_pages" : "batch_size_cache", *rows = paged ? "page_size" : "seqlen_cache";
        const Tensor &k = args_.k_cache, &v = args_.v_cache;
        Size entries, rows_k;
        if (check_shape("k_cache", k, {{first}, {rows}, {"num_heads_k"}, {"head_dim", head_dim_}})) {
            entries = k.sym_size(0), rows_k = k.sym_size(1);
            check_count("k_cache", first, entries);
            check_count("k_cache", rows, rows_k, paged ? 1 : 0);
            if (!any_entry && batch_size_ && known(entries->sym_lt(*batch_size_)))
                reasons_.add("k_cache", c10::str("at least batch_size=", *batch_size_, " batch entries"), *entries);
        }
        if (k.dim() == 4) num_heads_k_ = k.sym_size(2);
        if (check_shape("v_cache", v,
                        {{first, entries}, {rows, rows_k}, {"num_heads_k", num_heads_k_}, {"head_dim_v"}})) {
            head_dim_v_ = v.sym_size(3);
            check_head_dim("v_cache", "head_dim_v", head_dim_v_, kMaxCacheHeadDim);
        }
        check_layout("k_cache", k);
        check_layout("v_cache", v);
        // Pages of keys and values may be those of one pool: then the table decides (KvCacheValues).
        if (args_.k && !args_.block_table && overlap(args_))
            reasons_.add("v_cache", "memory apart from k_cache, or its leading columns", "overlapping memory");
    }
    // A copy of a cache could not be written in place, and would cost more than the attention.
    void check_layout(const char* name, const Tensor& cache) {
        if (cache.dim() != 4) return;
        if (known(cache.sym_size(-1).sym_gt(1)) && known(cache.sym_stride(-1).sym_ne(1)))
            reasons_.add(name, "a last dimension of stride 1", c10::str("stride ", cache.sym_stride(-1)));
        if (args_.k && at::has_internal_overlap(cache) == at::MemOverlap::Yes)
            reasons_.add(name, "elements that do not share memory, as rows are appended", "an expanded tensor");
    }
    void check_new_rows() {
        if (!args_.k) {
            if (args_.v) reasons_.add("k", "a tensor, as v is given", "None");
            return;
        }
        const bool one = args_.values_are_keys();
        if (!args_.v && !one) reasons_.add("v", "a tensor, as k is given", "None");
        const Tensor& k = *args_.k;
        Size seqlen_new;
        if (check_shape("k", k,
                        {{"batch_size", batch_size_},
                         {"seqlen_new"},
                         {"num_heads_k", num_heads_k_},
                         {"head_dim", head_dim_}})) {
            seqlen_new = seqlen_new_ = k.sym_size(1);
            check_count("k", "seqlen_new", seqlen_new);
        }
        if (args_.v) {
            check_shape("v", *args_.v,
                        {{"batch_size", batch_size_},
                         {"seqlen_new", seqlen_new},
                         {"num_heads_k", num_heads_k_},
                         {"head_dim_v", head_dim_v_}});
        }
        if (one && args_.v && !is_leading_columns(*args_.v, k)) {
            reasons_.add("v", "None or the leading columns of k, in its memory, as v_cache is that of k_cache",
                         "another tensor");
        }
        if (!args_.cache_seqlens && !args_.cache_seqlen)
            reasons_.add("cache_seqlens", "an int or a tensor, as k is given", "None");
        if (seqlen_q_ && known(capacity_.sym_gt(0)) && known(seqlen_q_->sym_gt(capacity_))) {
            reasons_.add("q", c10::str("seqlen_q of at most ", capacity_, ", the capacity of the cache, as k is given"),
                         *seqlen_q_);
        }
    }
    void check_rotary() {
        const OptionalTensor &cos = args_.rotary_cos, &sin = args_.rotary_sin;
        if (!cos && !sin) return;
        if (!cos || !sin) {
            reasons_.add(cos ? "rotary_sin" : "rotary_cos",
                         c10::str("a tensor, as ", cos ? "rotary_cos" : "rotary_sin", " is given"), "None");
        }
        if (!args_.k) reasons_.add(cos ? "rotary_cos" : "rotary_sin", "None, as no k is given", "a tensor");
        if (args_.k && args_.values_are_keys())
            reasons_.add("rotary_cos", "None, as keys are values too (rotate before the call)", "a tensor");
        if (!cos || !check_shape("rotary_cos", *cos, {{"seqlen_rotary"}, {"rotary_dim / 2"}})) return;
        const c10::SymInt rows = cos->sym_size(0), pairs = cos->sym_size(1);
        if (known(rows.sym_lt(capacity_))) {
            reasons_.add("rotary_cos", c10::str("at least ", capacity_, " rows, the capacity of the cache"), rows);
        }
        check_count("rotary_cos", "seqlen_rotary", rows, 1);
        if (known(pairs.sym_lt(1)) || (head_dim_ && known((pairs * 2).sym_gt(*head_dim_)))) {
            reasons_.add("rotary_cos",
                         c10::str("rotary_dim / 2 from 1 to head_dim / 2, with head_dim=",
                                  head_dim_ ? *head_dim_ : c10::SymInt(0)),
                         pairs);
        }
        if (sin) check_shape("rotary_sin", *sin, {{"seqlen_rotary", rows}, {"rotary_dim / 2", pairs}});
    }
    void check_lengths() {
        check_per_sequence("cache_seqlens", args_.cache_seqlens, batch_size_);
        check_per_sequence("cache_leftpad", args_.cache_leftpad, batch_size_);
        check_per_sequence("cache_batch_idx", args_.cache_batch_idx, batch_size_);
        if (args_.cache_seqlens && args_.cache_seqlen)
            reasons_.add("cache_seqlen", "None, as cache_seqlens is given", "an int");
        if (args_.cache_seqlen) check_scalar_length();
        if (!args_.block_table) return;
        if (args_.cache_batch_idx) reasons_.add("cache_batch_idx", "None, as block_table is given", "a tensor");
        check_device("block_table", *args_.block_table);
        check_dtype("block_table", *args_.block_table, at::kInt);
        if (check_shape("block_table", *args_.block_table, {{"batch_size", batch_size_}, {"max_pages"}}))
            check_count("block_table", "max_pages * page_size", capacity_);
    }
    void check_scalar_length() {
        const c10::SymInt& length = *args_.cache_seqlen;
        if (known((length + seqlen_new_).sym_gt(capacity_)) && known(length.sym_ge(0))) {
            reasons_.add("cache_seqlens", most_rows(capacity_, seqlen_new_), length);
        }
    }
    void check_numbers() {
        check_scores(args_, args_.q.scalar_type());
        if (args_.num_splits < 0 || args_.num_splits > kMaxSplits)
            reasons_.add("num_splits", c10::str("a number from 0 to ", kMaxSplits), args_.num_splits);
        if (!args_.softmax_scale && head_dim_ && known(head_dim_->sym_gt(kMaxHeadDim))) {
            reasons_.add("softmax_scale",
                         c10::str("a number, as head_dim=", *head_dim_,
                                  " is that of absorbed keys (multi-head latent "
                                  "attention), whose scale comes from the head_dim before they were absorbed"),
                         "None");
        }
    }

    const KvCacheArgs& args_;
    const c10::SymInt capacity_;
    c10::SymInt seqlen_new_ = 0;
    Size batch_size_, seqlen_q_, num_heads_, num_heads_k_, head_dim_, head_dim_v_;
};

// A page in use, in memory.
struct PageInMemory {
    int64_t begin, end;  // bytes
    bool of_values;
    int32_t page;
};

// Rows of the cache that one sequence appends: within an entry, which is a page or a batch entry.
struct NewRows {
    int64_t entry, begin, end;
    int batch;
    bool operator<(const NewRows& other) const {
        return std::tie(entry, begin, batch) < std::tie(other.entry, other.begin, other.batch);
    }
};

// Each kind of mistake is reported once, at its first occurrence.
class KvCacheValues {
public:
    KvCacheValues(const KvCacheArgs& args, const AppendParams& append)
        : args_(args), append_(append), p_(append.problem), seqlen_new_(p_.seqlens.seqlen_new),
          reasons_(Pass::kCache, /*packed=*/false) {}

    void check() {
        each(&KvCacheValues::is_length_good);
        if (p_.seqlens.leftpad_k) each(&KvCacheValues::is_leftpad_good);
        if (append_.rotary.cos && p_.seqlens.seqlen_q > 0) each(&KvCacheValues::is_position_good);
        if (p_.paged_kv.block_table) each(&KvCacheValues::are_entries_good);
        if (reasons_.empty() && seqlen_new_ > 0) check_rows_are_apart();
        if (reasons_.empty() && seqlen_new_ > 0 && args_.block_table && overlap(args_)) check_pages_are_apart();
        reasons_.raise_if_any();
    }

private:
    // Calls a check of one sequence, which returns false when it has added a reason, until then.
    void each(bool (KvCacheValues::*is_good)(int)) {
        for (int b = 0; b < p_.batch_size; ++b) {
            if (length(b) >= 0 && !(this->*is_good)(b)) return;
        }
    }
    int64_t length(int b) const { return p_.seqlens.seqused_k ? p_.seqlens.seqused_k[b] : append_.length; }
    std::string length_name(int b) const {
        return p_.seqlens.seqused_k ? c10::str("cache_seqlens[", b, ']') : "cache_seqlens";
    }

    bool is_length_good(int b) {
        if (length(b) + seqlen_new_ <= append_.capacity) return true;
        reasons_.add(length_name(b), most_rows(append_.capacity, seqlen_new_), length(b));
        return false;
    }
    // The padding may exceed the length: no key is left then.
    bool is_leftpad_good(int b) {
        if (p_.seqlens.leftpad_k[b] >= 0) return true;
        reasons_.add(c10::str("cache_leftpad[", b, ']'), "a number of at least 0", p_.seqlens.leftpad_k[b]);
        return false;
    }
    bool is_position_good(int b) {
        const int64_t last = length(b) + (append_.rotary.queries_advance ? p_.seqlens.seqlen_q - 1 : 0);
        if (last < append_.rotary.seqlen_rotary) return true;
        reasons_.add("rotary_cos", c10::str("a row for position ", last, ", that of the last query of sequence ", b),
                     c10::str(append_.rotary.seqlen_rotary, " rows"));
        return false;
    }
    // Indices into the table of a sequence: not those of padding alone, nor those after the new rows.
    c10::integer_range<int64_t> entries_in_use(int b) const {
        const int64_t rows = min(length(b) + seqlen_new_, append_.capacity), size = p_.paged_kv.page_size;
        const int64_t skipped = p_.seqlens.leftpad_k ? max(p_.seqlens.leftpad_k[b], 0) : 0;
        const int64_t first = min(skipped, length(b)) / size;
        return c10::irange(first, max(ceil_div(rows, size), first));
    }
    // The pages in use are of the pool, or the batch entry is of the cache.
    bool are_entries_good(int b) {
        const PagedKv& paged = p_.paged_kv;
        for (const int64_t i : entries_in_use(b)) {
            const int32_t entry = paged.block_table[b * paged.batch_stride + i];
            if (entry >= 0 && entry < paged.num_pages) continue;
            if (args_.block_table) {
                reasons_.add(c10::str("block_table[", b, ", ", i, ']'),
                             c10::str("a page from 0 to below num_pages=", paged.num_pages), entry);
            } else {
                reasons_.add(c10::str("cache_batch_idx[", b, ']'),
                             c10::str("a batch entry from 0 to below batch_size_cache=", paged.num_pages), entry);
            }
            return false;
        }
        return true;
    }
    // Pages of keys and pages of values in one pool must not be the same.
    void check_pages_are_apart() {
        std::vector<PageInMemory> all;
        for (const Tensor* cache : {&args_.k_cache, &args_.v_cache}) {
            const int64_t size = cache->itemsize(), last = (cache->size(1) - 1) * cache->stride(1) +
                                                           (cache->size(2) - 1) * cache->stride(2) + cache->size(3);
            const int64_t start = cache->storage_offset();
            for (const int32_t page : pages_in_use()) {
                const int64_t begin = start + page * cache->stride(0);
                all.push_back({begin * size, (begin + last) * size, cache == &args_.v_cache, page});
            }
        }
        std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
        for (size_t i = 1; i < all.size(); ++i) {
            const PageInMemory &one = all[i - 1], &two = all[i];
            if (one.of_values == two.of_values || one.end <= two.begin) continue;
            const int32_t of_keys = one.of_values ? two.page : one.page,
                          of_values = one.of_values ? one.page : two.page;
            return reasons_.add("block_table", "pages whose keys and values are apart in memory",
                                c10::str("page ", of_keys, " of k_cache where page ", of_values, " of v_cache is"));
        }
    }
    std::vector<int32_t> pages_in_use() const {
        const PagedKv& paged = p_.paged_kv;
        std::vector<int32_t> pages;
        for (int b = 0; b < p_.batch_size; ++b) {
            if (length(b) < 0) continue;
            for (const int64_t i : entries_in_use(b)) pages.push_back(paged.block_table[b * paged.batch_stride + i]);
        }
        return pages;
    }
    // Two sequences must not append to the same rows.
    void check_rows_are_apart() {
        const PagedKv& paged = p_.paged_kv;
        if (!paged.block_table) return;
        std::vector<NewRows> all;
        for (int b = 0; b < p_.batch_size; ++b) {
            if (length(b) < 0) continue;
            for (int64_t row = length(b), end = row + seqlen_new_, next; row < end; row = next) {
                const int64_t page = row / paged.page_size, first = page * paged.page_size;
                next = min(end, first + paged.page_size);
                all.push_back({paged.block_table[b * paged.batch_stride + page], row - first, next - first, b});
            }
        }
        std::sort(all.begin(), all.end());
        for (size_t i = 1; i < all.size(); ++i) {
            const NewRows &one = all[i - 1], &two = all[i];
            if (one.entry != two.entry || one.end <= two.begin) continue;
            return reasons_.add(args_.block_table ? "block_table" : "cache_batch_idx",
                                "sequences that append to different rows",
                                c10::str("sequences ", one.batch, " and ", two.batch, ", which both append to row ",
                                         two.begin, " of ", args_.block_table ? "page " : "batch entry ", two.entry));
        }
    }

    const KvCacheArgs& args_;
    const AppendParams& append_;
    const Problem& p_;
    const int64_t seqlen_new_;
    Reasons reasons_;
};

}  // namespace

void validate(const KvCacheArgs& args) {
    KvCacheValidator validator(args);
    validator.check();
    validator.raise_if_any();
}

void validate_values(const KvCacheArgs& args, const AppendParams& append) { KvCacheValues(args, append).check(); }

}  // namespace flash_attn
