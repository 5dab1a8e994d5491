// The checks that need no tensor data. Sizes may be symbolic under torch.compile: an equality of two sizes becomes a
// guard; limits are checked only for known sizes.
#include <ATen/MemoryOverlap.h>
#include "ops/checks.h"
#include "ops/memory_overlap.h"
#include "ops/prepare.h"
#include "policy/dropout.h"

namespace flash_attn {
namespace {

class Validator : public Checks {
public:
    explicit Validator(const ProblemArgs& args)
        : Checks(args.pass, args.packed(), args.q), args_(args), packed_(args.packed()) {}

    void check_problem() {
        check_types_and_devices();
        check_shapes();
        check_numbers();
        check_metadata();
    }
    void check_out(const Tensor& out) {
        check_tensor("out", out, result_type(args_), dims_like(true, true));
        check_memory("out", out, inputs());
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

private:
    void check_types_and_devices();
    void check_shapes();
    void check_batch_size();
    void check_q();
    void check_k_and_v();
    void check_numbers();
    void check_metadata();
    void check_block_table();
    void check_key_ranges();
    void check_rng_state();
    void check_positions(bool is_q);
    void check_heads_elsewhere();
    void check_tensor(const char* name, const Tensor& t, at::ScalarType dtype, Dims dims) {
        check_device(name, t);
        check_dtype(name, t, dtype);
        check_shape(name, t, dims);
    }
    struct Named {
        const char* name;
        const Tensor& tensor;
    };
    using NamedTensors = c10::SmallVector<Named, 10>;
    NamedTensors inputs() const { return {{"q", args_.q}, {"k", args_.k}, {"v", *args_.v}}; }
    // A tensor that is written shares memory neither with others nor among its elements.
    void check_memory(const char* name, const Tensor& written, const NamedTensors& others);
    // Expected dimensions of a tensor shaped like q (is_q) or k, with the head_dim of v (is_v) or of q.
    c10::SmallVector<Dim, 4> dims_like(bool is_q, bool is_v) const;

    const ProblemArgs& args_;
    const bool packed_;
    // Sizes, where the ranks of the tensors are valid. rows: seqlen, or total if packed.
    Size batch_size_, rows_q_, rows_k_, num_heads_, num_heads_k_, head_dim_, head_dim_v_;
};

void Validator::check_types_and_devices() {
    const Tensor &q = args_.q, &k = args_.k, &v = args_.v ? *args_.v : args_.k;
    const at::ScalarType type = q.scalar_type();
    if (!is_supported(type) || k.scalar_type() != type || v.scalar_type() != type) {
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
    check_heads("k", num_heads_, num_heads_k_);
    check_head_dim("q", "head_dim", head_dim_, kMaxHeadDim);
    if (args_.v) check_head_dim("v", "head_dim_v", head_dim_v_, kMaxHeadDim);
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

void Validator::check_numbers() {
    check_scores(args_, args_.q.scalar_type());
    if (!(args_.dropout_p >= 0 && args_.dropout_p < 1)) {
        reasons_.add("dropout_p", "a number in [0, 1)", args_.dropout_p);
    }
    check_positions(true);
    check_positions(false);
    check_heads_elsewhere();
}

// Starts that are given per sequence are checked with the other tensors (validate_values.cpp).
void Validator::check_positions(bool is_q) {
    const std::optional<int64_t>& start = is_q ? args_.q_start : args_.k_start;
    const OptionalTensor& starts = is_q ? args_.q_starts : args_.k_starts;
    const char* name = is_q ? "q_start" : "k_start";
    check_per_sequence(name, starts, batch_size_);
    if (start && starts) reasons_.add(name, "None, as starts of each sequence are given", *start);
    if (!start) return;
    const Size rows = packed_ ? Size(is_q ? args_.max_seqlen_q : args_.max_seqlen_k) : is_q ? rows_q_ : rows_k_;
    if (*start < 0 || *start > kMaxPosition || (rows && known((*rows + *start).sym_gt(kMaxPosition)))) {
        reasons_.add(name, c10::str("a position of at least 0, with all of the sequence below 2^30-256=", kMaxPosition),
                     *start);
    } else if (args_.dropout_p > 0 && *start % kStartAlignment != 0) {
        reasons_.add(name, c10::str("a multiple of ", kStartAlignment, ", as dropout_p is above 0"), *start);
    }
}

void Validator::check_heads_elsewhere() {
    if (args_.head_start < 0 || args_.head_start >= kMaxSeqlen) {
        return reasons_.add("head_start", c10::str("a head of at least 0 and below 2^30=", kMaxSeqlen),
                            args_.head_start);
    }
    if (!num_heads_ || (!args_.total_heads && args_.head_start == 0)) return;
    const Size total = args_.total_heads ? Size(*args_.total_heads) : num_heads_,
               least = *num_heads_ + args_.head_start;
    if (known(total->sym_lt(*least)) || known(total->sym_ge(kMaxSeqlen))) {
        reasons_.add("total_heads",
                     c10::str("at least head_start + num_heads = ", *least, " and below 2^30=", kMaxSeqlen), *total);
    }
}

void Validator::check_metadata() {
    check_per_sequence("seqused_k", args_.seqused_k, batch_size_);
    check_per_sequence("leftpad_k", args_.leftpad_k, batch_size_);
    check_block_table();
    check_alibi_slopes(args_.alibi_slopes, batch_size_, num_heads_);
    check_sinks(args_.s_aux, num_heads_);
    check_key_ranges();
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

void Validator::check_key_ranges() {
    if (!args_.key_ranges) return;
    const Tensor& ranges = *args_.key_ranges;
    check_device("key_ranges", ranges);
    check_dtype("key_ranges", ranges, at::kInt);
    const Dim rows{packed_ ? "total_q" : "seqlen_q", rows_q_}, bounds{"", 2};
    if (packed_) {
        check_shape("key_ranges", ranges, {rows, bounds});
        return;
    }
    const auto fits = [&](int64_t dim, const Size& size) { return !size || !differ(ranges.sym_size(dim), *size); };
    const bool shared = ranges.dim() == 3 && fits(0, SymInt(1)),
               good = ranges.dim() == 3 && fits(1, rows_q_) && fits(2, SymInt(2));
    if (good && (shared || fits(0, batch_size_))) return;
    reasons_.add("key_ranges",
                 "shape " + shape_text({{"batch_size", batch_size_}, rows, bounds}) + " or " +
                     shape_text({{"", 1}, rows, bounds}),
                 shape_text(ranges));
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

void Validator::check_memory(const char* name, const Tensor& written, const NamedTensors& others) {
    const char* const apart = "elements that do not share memory";
    if (at::has_internal_overlap(written) == at::MemOverlap::Yes) reasons_.add(name, apart, "an expanded tensor");
    if (written.is_meta() || !reasons_.empty()) return;  // without memory; sizes may be symbolic, or shapes wrong
    if (overlaps_itself(written)) reasons_.add(name, apart, c10::str("a view with strides ", written.strides()));
    for (const Named& other : others) {
        if (!share_memory(written, other.tensor)) continue;
        reasons_.add(name, c10::str("memory apart from ", other.name), "a tensor that shares some with it");
    }
}

void Validator::check_backward(const BwdArgs& args) {
    const at::ScalarType type = args_.q.scalar_type();
    check_tensor("dout", args.dout, type, dims_like(true, true));
    check_tensor("out", args.out, type, dims_like(true, true));
    check_tensor("dq", args.dq, result_type(args_), dims_like(true, false));
    check_tensor("dk", args.dk, result_type(args_), dims_like(false, false));
    check_tensor("dv", args.dv, result_type(args_), dims_like(false, true));
    check_lse("softmax_lse", args.softmax_lse);
    if (args.dlse) check_lse("dlse", *args.dlse);
    NamedTensors others = inputs();
    others.append({{"dout", args.dout}, {"out", args.out}, {"softmax_lse", args.softmax_lse}});
    if (args.dlse) others.push_back({"dlse", *args.dlse});
    for (const Named& written : {Named{"dq", args.dq}, Named{"dk", args.dk}, Named{"dv", args.dv}}) {
        check_memory(written.name, written.tensor, others);
        others.push_back(written);
    }
    if (args_.block_table) reasons_.add("block_table", "None, for pages of keys get no gradients", "a tensor");
}

}  // namespace

void validate(const FwdArgs& args) {
    Validator validator(args.problem);
    validator.check_problem();
    if (args.out) validator.check_out(*args.out);
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
