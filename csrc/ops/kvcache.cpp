// From the arguments of fwd_kvcache to the parameters of the kernels.
#include "ops/kvcache.h"
#include <algorithm>
#include "policy/seqlen.h"

namespace flash_attn {

bool is_leading_columns(const Tensor& part, const Tensor& whole) {
    if (part.dim() != whole.dim() || !part.has_storage() || !part.is_alias_of(whole)) return false;
    return TORCH_GUARD_OR_FALSE(part.sym_storage_offset().sym_eq(whole.sym_storage_offset())) &&
           part.sym_strides() == whole.sym_strides() &&
           TORCH_GUARD_OR_FALSE(part.sym_size(-1).sym_le(whole.sym_size(-1)));
}

namespace {

// Row [b] of the table: the batch entry of the cache, a page of its own.
OptionalTensor as_table(const KvCacheArgs& args) {
    if (args.block_table || !args.cache_batch_idx) return args.block_table;
    if (TORCH_GUARD_OR_FALSE(args.k_cache.sym_size(1).sym_eq(0))) return std::nullopt;  // pages have rows
    return args.cache_batch_idx->unsqueeze(1);
}

}  // namespace

bool KvCacheArgs::values_are_keys() const { return is_leading_columns(v_cache, k_cache); }

ProblemArgs KvCacheArgs::attention() const {
    return {{.seqused_k = cache_seqlens,
             .leftpad_k = cache_leftpad,
             .block_table = as_table(*this),
             .alibi_slopes = alibi_slopes,
             .softmax_scale = softmax_scale,
             .causal = causal,
             .window_size_left = window_size_left,
             .window_size_right = window_size_right,
             .attention_chunk = attention_chunk,
             .softcap = softcap,
             .s_aux = s_aux},
            Pass::kCache,
            q,
            k_cache,
            &v_cache};
}

c10::SymInt capacity_of(const KvCacheArgs& args) {
    if (args.k_cache.dim() != 4) return 0;
    const c10::SymInt rows = args.k_cache.sym_size(1);
    if (!args.block_table) return rows;
    return args.block_table->dim() == 2 ? args.block_table->sym_size(1) * rows : c10::SymInt(0);
}

PreparedKvCache::PreparedKvCache(const KvCacheArgs& args, Held (*readable)(const Tensor&))
    : PreparedProblem(args.attention(), readable) {
    Seqlens& s = problem_.seqlens;
    const int64_t capacity = capacity_of(args).expect_int();
    s.seqlen_new = args.k ? int32_t(args.k->size(1)) : 0;
    s.seqlen_k = append_.length = int32_t(std::min<int64_t>(capacity, kMaxSeqlen - 1));
    if (args.cache_seqlen) {
        append_.length = int32_t(std::clamp<int64_t>(args.cache_seqlen->expect_int(), -1, kMaxSeqlen));
        s.seqlen_k = length_with_new(append_.length, s.seqlen_new, s.seqlen_k);
    }
    append_.problem = problem_;
    append_.capacity = capacity;
    // The caches themselves: `readable` may have copied them.
    append_.problem.k = view_of(args.k_cache, /*packed=*/false);
    append_.problem.v = view_of(args.v_cache, /*packed=*/false);
    if (!args.k) return;
    k_new_ = last_dim_contiguous(*args.k);
    append_.k_new = view_of(*k_new_, /*packed=*/false);
    if (!args.values_are_keys()) {
        v_new_ = last_dim_contiguous(*args.v);
        append_.v_new = view_of(*v_new_, /*packed=*/false);
    }
    if (!args.rotary_cos) return;
    cos_ = last_dim_contiguous(*args.rotary_cos);
    sin_ = last_dim_contiguous(*args.rotary_sin);
    append_.rotary = {cos_->const_data_ptr(),  sin_->const_data_ptr(), cos_->stride(0),
                      sin_->stride(0),         int32_t(cos_->size(0)), int32_t(2 * cos_->size(1)),
                      args.rotary_interleaved, args.queries_advance()};
}

void PreparedKvCache::rotate_queries_into(const Tensor& q_rotated) {
    append_.q_rotated = problem_.q = view_of(q_rotated, /*packed=*/false);
}

}  // namespace flash_attn
