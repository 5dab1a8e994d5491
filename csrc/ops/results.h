// Result allocation shared by the devices, and the results of problems without any pair of query and key.
#pragma once
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <limits>
#include "ops/prepare.h"

namespace flash_attn {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline Tensor empty(const c10::SymDimVector& sizes, const Tensor& like, at::ScalarType type) {
    return at::empty(C10_AS_INTARRAYREF_SLOW(sizes), like.options().dtype(type));
}

// Whether there is any pair of query and key.
inline bool has_pairs(const Problem& p) { return p.batch_size > 0 && p.seqlens.seqlen_q > 0 && p.seqlens.seqlen_k > 0; }

// softmax_lse where no query sees a key: the sinks. Rows of packed tensors after the last sequence have none.
inline void fill_lse_without_keys(const ProblemArgs& args, const Tensor& softmax_lse) {
    softmax_lse.fill_(-kInfinity);
    if (!args.s_aux) return;
    const Tensor sinks = args.s_aux->to(softmax_lse.scalar_type()).unsqueeze(1);
    if (!args.packed()) {
        softmax_lse.copy_(sinks.expand_as(softmax_lse));
        return;
    }
    const Tensor row = at::arange(softmax_lse.size(1), args.cu_seqlens_q->options());
    softmax_lse.copy_(at::where(row.lt(args.cu_seqlens_q->select(0, -1)), sinks, softmax_lse));
}

// Largest scores before any is known; undefined if they are not asked for.
inline Tensor initial_max_logits(const ProblemArgs& args) {
    if (!args.return_max_logits) return {};
    return at::full(C10_AS_INTARRAYREF_SLOW(max_logits_sizes(args)), -kInfinity,
                    args.q.options().dtype(lse_type(args)));
}
inline void* data_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

// A tensor of results: written in place if kernels can write there, otherwise through a temporary that is copied.
class Target {
public:
    explicit Target(const Tensor& target)
        : target_(target), written_(is_last_dim_contiguous(target)
                                        ? c10::MaybeOwned<Tensor>::borrowed(target)
                                        : c10::MaybeOwned<Tensor>::owned(at::empty(target.sizes(), target.options()))) {
    }
    const Tensor& operator*() const { return *written_; }
    void finish() const {
        if (!written_.unsafeIsBorrowed()) target_.copy_(*written_);
    }

private:
    const Tensor& target_;
    c10::MaybeOwned<Tensor> written_;
};

// The backward pass of a problem without pairs.
inline void clear_gradients(const BwdArgs& args, const Tensor& dsoftmax_sum) {
    for (const Tensor& gradient : {args.dq, args.dk, args.dv}) gradient.zero_();
    dsoftmax_sum.zero_();
    if (args.problem.s_aux && args.dlse)  // rows that see only their sink
        dsoftmax_sum.sub_(args.dlse->masked_fill(args.softmax_lse.isinf(), 0));
}

}  // namespace flash_attn
