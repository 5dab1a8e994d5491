// Attention with a KV cache: the arguments of fwd_kvcache, their checks, and the parameters of the kernels.
#pragma once
#include "ops/prepare.h"

namespace flash_attn {

constexpr int64_t kMaxCacheHeadDim = 576;  // keys of multi-head latent attention: 512 latent and 64 rotary elements

// The keyword arguments.
struct KvCacheOptions {
    OptionalTensor k = {}, v = {}, rotary_cos = {}, rotary_sin = {};
    bool rotary_interleaved = true;
    std::optional<c10::SymInt> cache_seqlen = {};  // of every sequence; cache_seqlens: of each
    OptionalTensor cache_seqlens = {}, cache_batch_idx = {}, cache_leftpad = {}, block_table = {}, alibi_slopes = {};
    std::optional<double> softmax_scale = {};
    bool causal = false;
    int64_t window_size_left = -1, window_size_right = -1, attention_chunk = 0;
    double softcap = 0;
    OptionalTensor s_aux = {};
    int64_t num_splits = 0;

    // References to all fields, in the order of declaration, which is the order of the schema.
    template <class Self> static auto fields(Self& a) {
        return std::tie(a.k, a.v, a.rotary_cos, a.rotary_sin, a.rotary_interleaved, a.cache_seqlen, a.cache_seqlens,
                        a.cache_batch_idx, a.cache_leftpad, a.block_table, a.alibi_slopes, a.softmax_scale, a.causal,
                        a.window_size_left, a.window_size_right, a.attention_chunk, a.softcap, a.s_aux, a.num_splits);
    }
};

// q [batch_size, seqlen_q, num_heads, head_dim], k_cache [batch_size_cache, seqlen_cache, num_heads_k, head_dim] or,
// with block_table, [num_pages, page_size, num_heads_k, head_dim]; v_cache accordingly, with head_dim_v.
struct KvCacheArgs : KvCacheOptions {
    const Tensor& q;
    const Tensor& k_cache;
    const Tensor& v_cache;

    // Whether v_cache is the leading columns of k_cache: one row of the cache is key and value.
    bool values_are_keys() const;
    // Whether query i is rotated by the position of the i-th new row; otherwise all are by that of the first.
    bool queries_advance() const {
        return causal || window_size_left != -1 || window_size_right != -1 || attention_chunk > 0;
    }
    // The call as attention to pages: batch entries of the cache are pages of seqlen_cache rows.
    ProblemArgs attention() const;
};

// Checks all that is known without reading tensor data. Raises one ValueError with all reasons.
void validate(const KvCacheArgs& args);

// The Problem of validated arguments, over the cache with its new rows, and the parameters of appending them.
class PreparedKvCache : public PreparedProblem {
public:
    explicit PreparedKvCache(const KvCacheArgs& args, Held (*readable)(const Tensor&) = last_dim_contiguous);
    const AppendParams& append_params() const { return append_; }
    bool appends() const { return append_.problem.seqlens.seqlen_new > 0; }
    bool rotates() const { return append_.rotary.cos; }
    // Takes the queries from this tensor, which append writes.
    void rotate_queries_into(const Tensor& q_rotated);

private:
    Held k_new_, v_new_, cos_, sin_;
    AppendParams append_{};
};

// Checks the values of lengths, paddings and tables, which must be in host memory. Raises one ValueError with all
// reasons.
void validate_values(const KvCacheArgs& args, const AppendParams& append);

// Rows of a sequence that the cache has room for; 0 where shapes are wrong.
c10::SymInt capacity_of(const KvCacheArgs& args);
// Whether `part` is the leading columns of `whole`, in its memory.
bool is_leading_columns(const Tensor& part, const Tensor& whole);

// The ops with the signature that the dispatcher calls. Options: the types of the fields of KvCacheOptions.
template <class... Options> struct KvCacheOp {
    template <auto implementation>
    static auto run(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Options... options) {
        return implementation({{options...}, q, k_cache, v_cache});
    }
};
template <template <class...> class Template> using WithKvCacheOptions =
    WithTail<Template, decltype(KvCacheOptions::fields(std::declval<KvCacheOptions&>()))>;
using KvCacheOps = WithKvCacheOptions<KvCacheOp>;

}  // namespace flash_attn
