#include <torch/csrc/Exceptions.h>
#include "ops/calls.h"
#include "ops/eager_call.h"
#include "ops/kvcache.h"
#include "ops/reader.h"

namespace flash_attn {
namespace {

template <class... Options> struct SignatureWithOptions {
    using Fwd = CacheResult(const Tensor&, const Tensor&, const Tensor&, Options...);
};
using Fwd = WithKvCacheOptions<SignatureWithOptions>::Fwd;

struct EagerKvCacheCall {
    Tensor q, k_cache, v_cache;
    KvCacheOptions options;
    bool return_softmax_lse = false;

    // The order of flash_attn_with_kvcache.
    bool read(Reader reader) {
        KvCacheOptions& o = options;
        return reader.tensor(q) && reader.tensor(k_cache) && reader.tensor(v_cache) && reader.tensor(o.k) &&
               reader.tensor(o.v) && reader.tensor(o.rotary_cos) && reader.tensor(o.rotary_sin) &&
               read_lengths(reader) && reader.tensor(o.cache_batch_idx) && reader.tensor(o.cache_leftpad) &&
               reader.tensor(o.block_table) && reader.real(o.softmax_scale) && reader.boolean(o.causal) &&
               reader.window(o.window_size_left, o.window_size_right) && reader.real(o.softcap) &&
               reader.boolean(o.rotary_interleaved) && reader.tensor(o.alibi_slopes) && reader.integer(o.num_splits) &&
               reader.boolean(return_softmax_lse) && reader.integer(o.attention_chunk) && reader.tensor(o.s_aux) &&
               reader.is_at_end();
    }
    CacheResult run() const {
        static const auto op = find_op<Fwd>("flash_attn::fwd_kvcache");
        const pybind11::gil_scoped_release no_gil;
        return std::apply([&](const auto&... option) { return op.call(q, k_cache, v_cache, option...); },
                          KvCacheOptions::fields(options));
    }

private:
    bool read_lengths(Reader& reader) {
        if (reader.is_integer()) return reader.integer(options.cache_seqlen.emplace());
        return reader.tensor(options.cache_seqlens);
    }
};

}  // namespace

PyObject* eager_kvcache_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    EagerKvCacheCall call;
    if (!call.read({arguments, count}) || is_intercepted(call.k_cache)) Py_RETURN_NONE;
    const auto [out, softmax_lse] = call.run();
    if (!call.return_softmax_lse) return as_python(out).release().ptr();
    return pybind11::make_tuple(as_python(out), as_python(softmax_lse)).release().ptr();
    END_HANDLE_TH_ERRORS
}

}  // namespace flash_attn
