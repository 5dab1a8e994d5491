// The checks that need no tensor data. Sizes may be symbolic under torch.compile: an equality of two sizes becomes a
// guard; limits are checked only for known sizes.
#include <ATen/MemoryOverlap.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <cmath>
#include <sstream>
#include "ops/prepare.h"
#include "policy/score.h"

namespace flash_attn {
namespace {

using c10::SymInt;

// One expected dimension of a tensor: any size, or the size implied by other arguments.
struct Dim {
    const char* name;
    std::optional<SymInt> size = std::nullopt;
};
using Dims = c10::ArrayRef<Dim>;

bool differ(const SymInt& a, const SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_ne(b)); }
bool known(const c10::SymBool& condition) { return TORCH_STATICALLY_KNOWN_TRUE(condition); }

std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

std::string shape_text(const Tensor& t) {
    std::ostringstream text;
    text << '(';
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.sym_size(i);
    text << (t.dim() == 1 ? ",)" : ")");
    return text.str();
}

std::string shape_text(Dims dims) {
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

class Validator {
public:
    explicit Validator(const ProblemArgs& args) : args_(args), packed_(args.packed()), reasons_(args) {}

    void check_problem() {
        check_types_and_devices();
        check_shapes();
        check_numbers();
        check_metadata();
    }
    void check_backward(const BwdArgs& args);
    void check_lse(const char* name, const Tensor& lse) {
        check_device(name, lse);
        check_dtype(name, lse, lse_type(args_));
        if (packed_) {
            check_shape(name, lse, {{"num_heads", num_heads_}, {"total_q", rows_q_}});
        } else {
            check_shape(name, lse, {{"batch_size", batch_size_}, {"num_heads", num_heads_}, {"seqlen_q", rows_q_}});
        }
    }
    void raise_if_any() const { reasons_.raise_if_any(); }

private:
    void check_types_and_devices();
    void check_shapes();
    void check_batch_size();
    void check_q();
    void check_k_and_v();
    void check_heads();
    void check_numbers();
    template <class T> void check_score_numbers();
    void check_metadata();
    void check_block_table();
    void check_rng_state();
    // Expected dimensions of a tensor shaped like q (is_q) or k, with the head_dim of v (is_v) or of q.
    c10::SmallVector<Dim, 4> dims_like(bool is_q, bool is_v) const;

    void check_device(const char* name, const Tensor& t) {
        if (t.device() != args_.q.device()) {
            reasons_.add(name, c10::str("device ", args_.q.device(), " like q"), t.device());
        }
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
    void check_per_sequence(const char* name, const OptionalTensor& t) {
        if (!t) return;
        check_device(name, *t);
        check_dtype(name, *t, at::kInt);
        check_shape(name, *t, {{"batch_size", batch_size_}});
    }
    // Kernels hold every size but total_q and total_k in 32 bits.
    void check_count(const char* name, const char* what, const std::optional<SymInt>& count, int64_t least = 0) {
        if (count && (known(count->sym_lt(least)) || known(count->sym_ge(kMaxSeqlen)))) {
            reasons_.add(name, c10::str(what, " of at least ", least, " and below 2^30=", kMaxSeqlen), *count);
        }
    }
    void check_head_dim(const char* name, const char* what, const std::optional<SymInt>& size) {
        if (size && (known(size->sym_lt(1)) || known(size->sym_gt(kMaxHeadDim)))) {
            reasons_.add(name, c10::str(what, " from 1 to ", kMaxHeadDim), *size);
        }
    }

    const ProblemArgs& args_;
    const bool packed_;
    Reasons reasons_;
    // Sizes, where the ranks of the tensors are valid. rows: seqlen, or total if packed.
    std::optional<SymInt> batch_size_, rows_q_, rows_k_, num_heads_, num_heads_k_, head_dim_, head_dim_v_;
};

void Validator::check_types_and_devices() {
    const Tensor &q = args_.q, &k = args_.k, &v = args_.v ? *args_.v : args_.k;
    const at::ScalarType type = q.scalar_type();
    const bool allowed = type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
    if (!allowed || k.scalar_type() != type || v.scalar_type() != type) {
        std::string got = c10::str("q ", dtype_name(type), ", k ", dtype_name(k.scalar_type()));
        if (args_.v) got += c10::str(", v ", dtype_name(v.scalar_type()));
        reasons_.add(args_.v ? "q, k, v" : "q, k", "one dtype among float32, float64, bfloat16, float16", got);
    }
    check_device("k", k);
    if (args_.v) check_device("v", v);
}

void Validator::check_shapes() {
    check_batch_size();
    check_q();
    check_k_and_v();
    check_heads();
    check_head_dim("q", "head_dim", head_dim_);
    if (args_.v) check_head_dim("v", "head_dim_v", head_dim_v_);
}

void Validator::check_batch_size() {
    if (!packed_) return;
    for (const bool is_q : {true, false}) {
        const OptionalTensor& cu_seqlens = is_q ? args_.cu_seqlens_q : args_.cu_seqlens_k;
        const char* name = is_q ? "cu_seqlens_q" : "cu_seqlens_k";
        if (!cu_seqlens) {
            reasons_.add(name, c10::str("a tensor, as ", is_q ? "cu_seqlens_k" : "cu_seqlens_q", " is given"), "None");
            continue;
        }
        check_device(name, *cu_seqlens);
        check_dtype(name, *cu_seqlens, at::kInt);
        const bool has_batch = cu_seqlens->dim() == 1 && !known(cu_seqlens->sym_size(0).sym_lt(1));
        if (batch_size_) {
            check_shape(name, *cu_seqlens, {{"batch_size+1", *batch_size_ + 1}});
        } else if (has_batch) {
            batch_size_ = cu_seqlens->sym_size(0) - 1;
        } else {
            reasons_.add(name, "shape (batch_size+1,) with batch_size of at least 0", shape_text(*cu_seqlens));
        }
    }
}

void Validator::check_q() {
    const Tensor& q = args_.q;
    bool good;
    if (packed_) {
        good = check_shape("q", q, {{"total_q"}, {"num_heads"}, {"head_dim"}});
        check_count("max_seqlen_q", "a length", args_.max_seqlen_q);
    } else {
        good = check_shape("q", q, {{"batch_size"}, {"seqlen_q"}, {"num_heads"}, {"head_dim"}});
    }
    if (!good) return;
    rows_q_ = q.sym_size(-3), num_heads_ = q.sym_size(-2), head_dim_ = q.sym_size(-1);
    if (!packed_) {
        batch_size_ = q.sym_size(0);
        check_count("q", "seqlen_q", rows_q_);
    }
    check_count(packed_ ? "cu_seqlens_q" : "q", "batch_size", batch_size_);
}

void Validator::check_k_and_v() {
    const Tensor& k = args_.k;
    const bool paged = args_.block_table.has_value();
    const bool with_batch = !packed_ || paged;
    // The first dimension of k and v.
    const Dim first = paged ? Dim{"num_pages"} : Dim{"batch_size", batch_size_};
    const char* rows = paged ? "page_size" : packed_ ? "total_k" : "seqlen_k";
    const bool good = with_batch ? check_shape("k", k, {first, {rows}, {"num_heads_k"}, {"head_dim", head_dim_}})
                                 : check_shape("k", k, {{rows}, {"num_heads_k"}, {"head_dim", head_dim_}});
    if (k.dim() == (with_batch ? 4 : 3)) rows_k_ = k.sym_size(-3), num_heads_k_ = k.sym_size(-2);
    if (with_batch) check_count("k", rows, rows_k_, paged ? 1 : 0);
    if (paged && good) check_count("k", "num_pages", k.sym_size(0));
    if (packed_) check_count("max_seqlen_k", "a length", args_.max_seqlen_k);
    if (!args_.v) return;

    const Tensor& v = *args_.v;
    const Dim pages = paged && good ? Dim{"num_pages", k.sym_size(0)} : first;
    if (with_batch) {
        check_shape("v", v, {pages, {rows, rows_k_}, {"num_heads_k", num_heads_k_}, {"head_dim_v"}});
    } else {
        check_shape("v", v, {{rows, rows_k_}, {"num_heads_k", num_heads_k_}, {"head_dim_v"}});
    }
    if (v.dim() == (with_batch ? 4 : 3)) head_dim_v_ = v.sym_size(-1);
}

void Validator::check_heads() {
    check_count("q", "num_heads", num_heads_, 1);
    check_count("k", "num_heads_k", num_heads_k_, 1);
    if (!num_heads_ || !num_heads_k_ || known(num_heads_k_->sym_lt(1))) return;
    if (differ(*num_heads_ % *num_heads_k_, 0)) {
        reasons_.add("k", c10::str("num_heads_k that divides num_heads=", *num_heads_), *num_heads_k_);
    }
}

// Whether x is positive and normal (not subnormal) in T, the type that scores are computed in.
template <class T> bool is_normal(double x) { return x > 0 && std::isnormal(T(x)); }

template <class T> void Validator::check_score_numbers() {
    constexpr bool is_float32 = sizeof(T) == 4;
    const double scale = args_.softmax_scale.value_or(1.0), cap = args_.softcap;
    if (!is_normal<T>(scale) || !is_normal<T>(scale * kLog2e)) {
        reasons_.add("softmax_scale", is_float32 ? "a finite number above 0 (in float32)" : "a finite number above 0",
                     scale);
    }
    if (cap <= 0) return;  // no softcap; NaN is rejected below
    if (!is_normal<T>(cap) || !is_normal<T>(1 / cap)) {
        reasons_.add("softcap", is_float32 ? "a finite number (in float32), or 0" : "a finite number, or 0", cap);
    } else if (is_normal<T>(scale) && !is_normal<T>(scale / cap)) {
        reasons_.add("softcap", c10::str("a number by which softmax_scale=", scale, " can be divided"), cap);
    }
}

void Validator::check_numbers() {
    args_.q.scalar_type() == at::kDouble ? check_score_numbers<double>() : check_score_numbers<float>();
    if (args_.attention_chunk < 0) reasons_.add("attention_chunk", "a number of keys, or 0", args_.attention_chunk);
    if (!(args_.dropout_p >= 0 && args_.dropout_p < 1)) {
        reasons_.add("dropout_p", "a number in [0, 1)", args_.dropout_p);
    }
}

void Validator::check_metadata() {
    check_per_sequence("seqused_k", args_.seqused_k);
    check_per_sequence("leftpad_k", args_.leftpad_k);
    check_block_table();
    if (args_.alibi_slopes) {
        const Tensor& slopes = *args_.alibi_slopes;
        check_device("alibi_slopes", slopes);
        check_dtype("alibi_slopes", slopes, at::kFloat);
        const bool per_head = slopes.dim() == 1 && !(num_heads_ && differ(slopes.sym_size(0), *num_heads_));
        const bool per_batch = slopes.dim() == 2 && !(batch_size_ && differ(slopes.sym_size(0), *batch_size_)) &&
                               !(num_heads_ && differ(slopes.sym_size(1), *num_heads_));
        if (!per_head && !per_batch) {
            const Dim batch{"batch_size", batch_size_}, heads{"num_heads", num_heads_};
            reasons_.add("alibi_slopes", "shape " + shape_text({heads}) + " or " + shape_text({batch, heads}),
                         shape_text(slopes));
        }
    }
    check_rng_state();
}

void Validator::check_block_table() {
    if (!args_.block_table) return;
    const Tensor& table = *args_.block_table;
    if (!packed_) return reasons_.add("block_table", "None without cu_seqlens_q and cu_seqlens_k", "a tensor");
    check_device("block_table", table);
    check_dtype("block_table", table, at::kInt);
    if (check_shape("block_table", table, {{"batch_size", batch_size_}, {"max_pages"}})) {
        check_count("block_table", "max_pages", table.sym_size(1));
    }
}

void Validator::check_rng_state() {
    if (!(args_.dropout_p > 0 && args_.dropout_p < 1)) return;
    if (!args_.rng_state) {
        return reasons_.add("rng_state", "an int64 tensor of shape (2,), as dropout_p is above 0", "None");
    }
    check_device("rng_state", *args_.rng_state);
    check_dtype("rng_state", *args_.rng_state, at::kLong);
    check_shape("rng_state", *args_.rng_state, {{"", 2}});
}

c10::SmallVector<Dim, 4> Validator::dims_like(bool is_q, bool is_v) const {
    c10::SmallVector<Dim, 4> dims;
    if (!packed_) dims.push_back({"batch_size", batch_size_});
    dims.push_back(is_q ? Dim{packed_ ? "total_q" : "seqlen_q", rows_q_}
                        : Dim{packed_ ? "total_k" : "seqlen_k", rows_k_});
    dims.push_back(is_q ? Dim{"num_heads", num_heads_} : Dim{"num_heads_k", num_heads_k_});
    dims.push_back(is_v ? Dim{"head_dim_v", head_dim_v_} : Dim{"head_dim", head_dim_});
    return dims;
}

void Validator::check_backward(const BwdArgs& args) {
    const struct {
        const char* name;
        const Tensor& tensor;
        bool is_q, is_v, written;
    } tensors[] = {{"dout", args.dout, true, true, false},
                   {"out", args.out, true, true, false},
                   {"dq", args.dq, true, false, true},
                   {"dk", args.dk, false, false, true},
                   {"dv", args.dv, false, true, true}};
    for (const auto& [name, tensor, is_q, is_v, written] : tensors) {
        check_device(name, tensor);
        check_dtype(name, tensor, args_.q.scalar_type());
        check_shape(name, tensor, dims_like(is_q, is_v));
        if (written && at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
            reasons_.add(name, "elements that do not share memory", "an expanded tensor");
        }
    }
    check_lse("softmax_lse", args.softmax_lse);
    if (args.dlse) check_lse("dlse", *args.dlse);
    if (args_.block_table) reasons_.add("block_table", "None, for pages of keys get no gradients", "a tensor");
}

}  // namespace

void validate(const FwdArgs& args) {
    Validator validator(args.problem);
    validator.check_problem();
    validator.raise_if_any();
}

void validate(const BwdArgs& args) {
    Validator validator(args.problem);
    validator.check_problem();
    validator.check_backward(args);
    validator.raise_if_any();
}

void validate(const ProbsArgs& args) {
    Validator validator(args.problem);
    validator.check_problem();
    validator.check_lse("softmax_lse", args.softmax_lse);
    validator.raise_if_any();
}

}  // namespace flash_attn
