// Result allocation shared by the devices, and the results of problems without any pair of query and key.
#pragma once
#include <ATen/ops/empty.h>
#include <limits>
#include "ops/prepare.h"

namespace flash_attn {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline Tensor empty(const c10::SymDimVector& sizes, const Tensor& like, at::ScalarType type) {
    return at::empty(C10_AS_INTARRAYREF_SLOW(sizes), like.options().dtype(type));
}

// Whether there is any pair of query and key.
inline bool has_pairs(const Problem& p) { return p.batch_size > 0 && p.seqlens.seqlen_q > 0 && p.seqlens.seqlen_k > 0; }

// A gradient tensor: written in place if kernels can write there, otherwise through a temporary that is copied.
class Gradient {
public:
    explicit Gradient(const Tensor& target)
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

// The backward pass of a problem without pairs: zeros.
inline void clear_gradients(const BwdArgs& args, const Tensor& dsoftmax_sum) {
    for (const Tensor& gradient : {args.dq, args.dk, args.dv}) gradient.zero_();
    dsoftmax_sum.zero_();
}

}  // namespace flash_attn
