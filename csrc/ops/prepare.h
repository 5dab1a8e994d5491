// From tensors to a Problem: the one validator of every backend, and the views that kernels are given.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include "ops/arguments.h"
#include "ops/reasons.h"
#include "problem.h"

namespace flash_attn {

constexpr int64_t kMaxHeadDim = 512;

// Types, devices, ranks, shapes and numbers, all that can be known without reading a tensor. Sizes may be symbolic.
// Raises ValueError with all reasons.
void validate(const FwdArgs& args);
void validate(const BwdArgs& args);
void validate(const ProbsArgs& args);

// The shapes of what the ops return, of validated arguments.
c10::SymDimVector out_sizes(const ProblemArgs& args);
c10::SymDimVector lse_sizes(const ProblemArgs& args);
c10::SymDimVector probs_sizes(const ProblemArgs& args);
// float32, or float64 for float64 elements.
at::ScalarType lse_type(const ProblemArgs& args);

// The values of cu_seqlens, seqused_k, leftpad_k and block_table, which must lie in host memory. Raises ValueError with
// all reasons.
void validate_values(const ProblemArgs& args, const Problem& problem);

// The tensor itself where its last dimension is contiguous, a contiguous copy otherwise.
c10::MaybeOwned<Tensor> last_dim_contiguous(const Tensor& tensor);
bool is_last_dim_contiguous(const Tensor& tensor);

// A Problem over validated arguments. Where kernels cannot read a tensor as it lies, readable gives them a copy; copies
// live as long as this.
class PreparedProblem {
public:
    using Held = c10::MaybeOwned<Tensor>;
    explicit PreparedProblem(const ProblemArgs& args, Held (*readable)(const Tensor&) = last_dim_contiguous);
    const Problem& operator*() const { return problem_; }

private:
    const int32_t* metadata(const OptionalTensor& tensor, Held& held);
    DropoutParams dropout_of(const ProblemArgs& args);

    Held q_, k_, v_, cu_seqlens_q_, cu_seqlens_k_, seqused_k_, leftpad_k_, block_table_, alibi_slopes_, rng_state_;
    Problem problem_{};
};

// Views of tensors whose last dimension is contiguous; packed: without a batch dimension.
TensorView view_of(const Tensor& tensor, bool packed);
RowView row_view_of(const Tensor& tensor, bool packed);

}  // namespace flash_attn
