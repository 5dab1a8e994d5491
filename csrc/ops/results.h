// What the ops of every device allocate, and what they write where no query sees any key.
#pragma once
#include <ATen/ops/empty.h>
#include <limits>
#include "ops/prepare.h"

namespace flash_attn {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline Tensor empty(const c10::SymDimVector& sizes, const Tensor& like, at::ScalarType type) {
    return at::empty(C10_AS_INTARRAYREF_SLOW(sizes), like.options().dtype(type));
}

// Whether any query can see any key.
inline bool has_pairs(const Problem& p) { return p.batch_size > 0 && p.seqlens.seqlen_q > 0 && p.seqlens.seqlen_k > 0; }

// A gradient that is written where it belongs if kernels can write there, and copied there otherwise.
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

// The backward pass without pairs.
inline void clear_gradients(const BwdArgs& args, const Tensor& dsoftmax_sum) {
    for (const Tensor& gradient : {args.dq, args.dk, args.dv}) gradient.zero_();
    dsoftmax_sum.zero_();
}

}  // namespace flash_attn
