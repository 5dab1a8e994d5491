// The checks of single tensors and numbers that the validators of all ops share. Sizes may be symbolic under
// torch.compile: an equality of two sizes becomes a guard; limits are checked only for known sizes.
#pragma once
#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <cmath>
#include <sstream>
#include "ops/reasons.h"
#include "policy/scalars.h"
#include "problem.h"

namespace flash_attn {

using c10::SymInt;

// One expected dimension of a tensor: any size, or the size implied by other arguments.
struct Dim {
    const char* name;
    std::optional<SymInt> size = std::nullopt;
};
using Dims = c10::ArrayRef<Dim>;

inline bool differ(const SymInt& a, const SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_ne(b)); }
inline bool known(const c10::SymBool& condition) { return TORCH_STATICALLY_KNOWN_TRUE(condition); }

inline std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }
inline bool is_supported(at::ScalarType type) {
    return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline std::string shape_text(const Tensor& t) {
    std::ostringstream text;
    text << '(';
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.sym_size(i);
    text << (t.dim() == 1 ? ",)" : ")");
    return text.str();
}

inline std::string shape_text(Dims dims) {
    std::ostringstream text;
    text << '(';
    const char* separator = "";
    for (const Dim& dim : dims) {
        text << separator << dim.name;
        if (dim.size) text << (*dim.name ? "=" : "") << *dim.size;
        separator = ", ";
    }
    text << (dims.size() == 1 ? ",)" : ")");
    return text.str();
}

// Whether x is positive and normal (not subnormal) in T, the type that scores are computed in.
template <class T> bool is_normal(double x) { return x > 0 && std::isnormal(T(x)); }

class Checks {
public:
    void raise_if_any() const { reasons_.raise_if_any(); }

protected:
    using Size = std::optional<SymInt>;

    Checks(Pass pass, bool packed, const Tensor& q) : reasons_(pass, packed), device_(q.device()) {}

    void check_device(const char* name, const Tensor& t) {
        if (t.device() != device_) reasons_.add(name, c10::str("device ", device_, " like q"), t.device());
    }
    void check_dtype(const char* name, const Tensor& t, at::ScalarType expected) {
        if (t.scalar_type() != expected) {
            reasons_.add(name, "dtype " + dtype_name(expected), dtype_name(t.scalar_type()));
        }
    }
    bool check_shape(const char* name, const Tensor& t, Dims dims) {
        bool good = t.dim() == int64_t(dims.size());
        if (good) {
            int64_t i = 0;
            for (const Dim& dim : dims) good &= !(dim.size && differ(t.sym_size(i), *dim.size)), ++i;
        }
        if (!good) reasons_.add(name, "shape " + shape_text(dims), shape_text(t));
        return good;
    }
    // An int32 tensor with one value per sequence.
    void check_per_sequence(const char* name, const OptionalTensor& t, const Size& batch_size) {
        if (!t) return;
        check_device(name, *t);
        check_dtype(name, *t, at::kInt);
        check_shape(name, *t, {{"batch_size", batch_size}});
    }
    // Kernels hold every size but total_q and total_k in 32 bits.
    void check_count(const char* name, const char* what, const Size& count, int64_t least = 0) {
        if (count && (known(count->sym_lt(least)) || known(count->sym_ge(kMaxSeqlen)))) {
            reasons_.add(name, c10::str(what, " of at least ", least, " and below 2^30=", kMaxSeqlen), *count);
        }
    }
    void check_head_dim(const char* name, const char* what, const Size& size, int64_t most) {
        if (size && (known(size->sym_lt(1)) || known(size->sym_gt(most)))) {
            reasons_.add(name, c10::str(what, " from 1 to ", most), *size);
        }
    }
    void check_heads(const char* name_k, const Size& num_heads, const Size& num_heads_k) {
        check_count("q", "num_heads", num_heads, 1);
        check_count(name_k, "num_heads_k", num_heads_k, 1);
        if (!num_heads || !num_heads_k || known(num_heads_k->sym_lt(1))) return;
        if (differ(*num_heads % *num_heads_k, 0)) {
            reasons_.add(name_k, c10::str("num_heads_k that divides num_heads=", *num_heads), *num_heads_k);
        }
    }
    void check_alibi_slopes(const OptionalTensor& alibi_slopes, const Size& batch_size, const Size& num_heads) {
        if (!alibi_slopes) return;
        const Tensor& slopes = *alibi_slopes;
        check_device("alibi_slopes", slopes);
        check_dtype("alibi_slopes", slopes, at::kFloat);
        const bool per_head = slopes.dim() == 1 && !(num_heads && differ(slopes.sym_size(0), *num_heads));
        const bool per_batch = slopes.dim() == 2 && !(batch_size && differ(slopes.sym_size(0), *batch_size)) &&
                               !(num_heads && differ(slopes.sym_size(1), *num_heads));
        if (!per_head && !per_batch) {
            const Dim batch{"batch_size", batch_size}, heads{"num_heads", num_heads};
            reasons_.add("alibi_slopes", "shape " + shape_text({heads}) + " or " + shape_text({batch, heads}),
                         shape_text(slopes));
        }
    }
    void check_sinks(const OptionalTensor& s_aux, const Size& num_heads) {
        if (!s_aux) return;
        check_device("s_aux", *s_aux);
        if (!is_supported(s_aux->scalar_type())) {
            reasons_.add("s_aux", "dtype float32, float64, bfloat16 or float16", dtype_name(s_aux->scalar_type()));
        }
        check_shape("s_aux", *s_aux, {{"num_heads", num_heads}});
    }
    // softmax_scale, softcap and attention_chunk of a record of arguments, for elements of a type.
    template <class Args> void check_scores(const Args& args, at::ScalarType type) {
        type == at::kDouble ? check_scores_in<double>(args) : check_scores_in<float>(args);
        if (args.attention_chunk < 0) reasons_.add("attention_chunk", "a number of keys, or 0", args.attention_chunk);
    }

    Reasons reasons_;

private:
    template <class T, class Args> void check_scores_in(const Args& args) {
        constexpr bool is_float32 = sizeof(T) == 4;
        const double scale = args.softmax_scale.value_or(1.0), cap = args.softcap;
        if (!is_normal<T>(scale) || !is_normal<T>(scale * kLog2e)) {
            reasons_.add("softmax_scale",
                         is_float32 ? "a finite number above 0 (in float32)" : "a finite number above 0", scale);
        }
        if (cap <= 0) return;  // no softcap; NaN is rejected below
        if (!is_normal<T>(cap) || !is_normal<T>(1 / cap)) {
            reasons_.add("softcap", is_float32 ? "a finite number (in float32), or 0" : "a finite number, or 0", cap);
        } else if (is_normal<T>(scale) && !is_normal<T>(scale / cap)) {
            reasons_.add("softcap", c10::str("a number by which softmax_scale=", scale, " can be divided"), cap);
        }
    }

    const c10::Device device_;
};

}  // namespace flash_attn
