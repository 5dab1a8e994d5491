// Tensor views, result shapes and the Problem.
#include "ops/prepare.h"
#include <cmath>
#include "ops/asked_backend.h"
#include "policy/host_device.h"
#include "policy/mask.h"
#include "policy/scalars.h"

namespace flash_attn {
namespace {

using c10::MaybeOwned;

ElementType element_type(at::ScalarType type) {
    switch (type) {
        case at::kFloat:
            return ElementType::kFloat32;
        case at::kDouble:
            return ElementType::kFloat64;
        case at::kBFloat16:
            return ElementType::kBFloat16;
        default:
            return ElementType::kFloat16;
    }
}

Window window_of(const ProblemArgs& args) {
    const auto width = [](int64_t size) { return int32_t(size < 0 ? kMaxSeqlen : min<int64_t>(size, kMaxSeqlen)); };
    return {width(args.window_size_left), args.causal ? 0 : width(args.window_size_right)};
}

}  // namespace

bool is_last_dim_contiguous(const Tensor& tensor) { return tensor.stride(-1) == 1 || tensor.size(-1) <= 1; }

MaybeOwned<Tensor> last_dim_contiguous(const Tensor& tensor) {
    return is_last_dim_contiguous(tensor) ? MaybeOwned<Tensor>::borrowed(tensor)
                                          : MaybeOwned<Tensor>::owned(tensor.contiguous());
}

TensorView view_of(const Tensor& tensor, bool packed) {
    const at::IntArrayRef stride = tensor.strides();
    void* data = const_cast<void*>(tensor.const_data_ptr());
    return packed ? TensorView{data, 0, stride[0], stride[1]} : TensorView{data, stride[0], stride[1], stride[2]};
}

RowView row_view_of(const Tensor& tensor, bool packed) {
    const at::IntArrayRef stride = tensor.strides();
    void* data = const_cast<void*>(tensor.const_data_ptr());
    return packed ? RowView{data, 0, stride[0]} : RowView{data, stride[0], stride[1]};
}

const int32_t* PreparedProblem::metadata(const OptionalTensor& tensor, Held& held) {
    if (!tensor) return nullptr;
    held = last_dim_contiguous(*tensor);
    return held->const_data_ptr<int32_t>();
}

// A CUDA rng_state is passed by pointer: reading it here would synchronise with the device.
DropoutParams PreparedProblem::dropout_of(const ProblemArgs& args) {
    if (!(args.dropout_p > 0)) return {};
    rng_state_ = last_dim_contiguous(*args.rng_state);
    const int64_t* state = rng_state_->const_data_ptr<int64_t>();
    const uint32_t threshold = min<uint32_t>(std::lround(args.dropout_p * 65536), 65535);
    if (!rng_state_->is_cpu()) return {threshold, 0, 0, state, 0, 0};
    return {threshold, uint64_t(state[0]), uint64_t(state[1]), nullptr, 0, 0};
}

KeyRanges PreparedProblem::key_ranges_of(const ProblemArgs& args) {
    if (!args.key_ranges) return {};
    key_ranges_ = args.key_ranges->expect_contiguous();
    const bool shared = args.packed() || key_ranges_->size(0) == 1;
    return {key_ranges_->const_data_ptr<int32_t>(), shared ? 0 : key_ranges_->size(1), nullptr, nullptr};
}

PreparedProblem::PreparedProblem(const ProblemArgs& args, Held (*readable)(const Tensor&)) {
    check_asked_backend(args.q.device());
    const bool packed = args.packed(), paged = args.block_table.has_value();
    q_ = readable(args.q);
    k_ = readable(args.k);
    Problem& p = problem_;
    p.type = element_type(args.q.scalar_type());
    p.batch_size = int32_t(packed ? args.cu_seqlens_q->size(0) - 1 : args.q.size(0));
    p.num_heads = int32_t(args.q.size(-2));
    p.num_heads_k = int32_t(args.k.size(-2));
    p.head_dim = int32_t(args.q.size(-1));
    p.q = view_of(*q_, packed);
    p.k = view_of(*k_, packed && !paged);
    if (args.v) {
        v_ = readable(*args.v);
        p.v = view_of(*v_, packed && !paged);
        p.head_dim_v = int32_t(args.v->size(-1));
    }
    p.seqlens.cu_seqlens_q = metadata(args.cu_seqlens_q, cu_seqlens_q_);
    p.seqlens.cu_seqlens_k = metadata(args.cu_seqlens_k, cu_seqlens_k_);
    p.seqlens.seqused_k = metadata(args.seqused_k, seqused_k_);
    p.seqlens.leftpad_k = metadata(args.leftpad_k, leftpad_k_);
    p.seqlens.total_q = packed ? args.q.size(0) : 0;
    p.seqlens.total_k = packed && !paged ? args.k.size(0) : 0;
    p.seqlens.seqlen_q = int32_t(packed ? args.max_seqlen_q.expect_int() : args.q.size(1));
    p.seqlens.seqlen_k = int32_t(packed ? args.max_seqlen_k.expect_int() : args.k.size(1));
    if (paged) {
        p.paged_kv.block_table = metadata(args.block_table, block_table_);
        p.paged_kv.batch_stride = block_table_->stride(0);
        p.paged_kv.max_pages = int32_t(block_table_->size(1));
        p.paged_kv.num_pages = int32_t(args.k.size(0));
        p.paged_kv.page_size = int32_t(args.k.size(1));
    }
    p.positions = {args.has_positions(), metadata(args.q_starts, q_starts_), metadata(args.k_starts, k_starts_),
                   int32_t(args.q_start.value_or(0)), int32_t(args.k_start.value_or(0))};
    p.float_results = args.float_results;
    p.window = window_of(args);
    p.chunks = make_chunks(int(min<int64_t>(args.attention_chunk, kMaxSeqlen - 1)));
    p.key_ranges = key_ranges_of(args);
    // The same floating-point result as Python's head_dim ** -0.5.
    p.score.softmax_scale = args.softmax_scale.value_or(std::pow(double(p.head_dim), -0.5));
    p.score.softcap = max(args.softcap, 0.0);
    if (args.alibi_slopes) {
        alibi_slopes_ = last_dim_contiguous(*args.alibi_slopes);
        p.score.alibi_slopes = alibi_slopes_->const_data_ptr<float>();
        p.score.alibi_batch_stride = alibi_slopes_->dim() == 2 ? alibi_slopes_->stride(0) : 0;
    }
    if (args.s_aux) {
        sinks_ = Held::owned(args.s_aux->to(lse_type(args)).contiguous());
        p.score.sinks = sinks_->const_data_ptr();
    }
    p.dropout = dropout_of(args);
    p.dropout.head_start = int32_t(args.head_start);
    p.dropout.heads_elsewhere = int32_t(args.total_heads.value_or(p.num_heads) - p.num_heads);
    round_scalars(p);
}

c10::SymDimVector out_sizes(const ProblemArgs& args) {
    c10::SymDimVector sizes(args.q.sym_sizes());
    sizes.back() = args.v->sym_size(-1);
    return sizes;
}

c10::SymDimVector lse_sizes(const ProblemArgs& args) {
    const Tensor& q = args.q;
    if (args.packed()) return {q.sym_size(1), q.sym_size(0)};
    return {q.sym_size(0), q.sym_size(2), q.sym_size(1)};
}

c10::SymDimVector probs_sizes(const ProblemArgs& args) {
    const Tensor &q = args.q, &k = args.k;
    if (args.packed()) {
        return {args.cu_seqlens_q->sym_size(0) - 1, q.sym_size(1), args.max_seqlen_q, args.max_seqlen_k};
    }
    return {q.sym_size(0), q.sym_size(2), q.sym_size(1), k.sym_size(1)};
}

c10::SymDimVector max_logits_sizes(const ProblemArgs& args) {
    return {args.packed() ? args.cu_seqlens_q->sym_size(0) - 1 : args.q.sym_size(0), args.q.sym_size(-2)};
}

at::ScalarType lse_type(const ProblemArgs& args) {
    return args.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType result_type(const ProblemArgs& args) {
    return args.float_results ? lse_type(args) : args.q.scalar_type();
}

}  // namespace flash_attn
