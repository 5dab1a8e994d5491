// From tensors to a Problem: the validator of every backend, and the views that kernels get.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include "ops/arguments.h"
#include "ops/reasons.h"
#include "problem.h"

namespace flash_attn {

constexpr int64_t kMaxHeadDim = 512;

// Checks types, devices, ranks, shapes and scalars: everything that is known without reading tensor data. Sizes may be
// symbolic. Raises one ValueError with all reasons.
void validate(const FwdArgs& args);
void validate(const BwdArgs& args);
void validate(const ProbsArgs& args);

// Shapes of the results, for validated arguments.
c10::SymDimVector out_sizes(const ProblemArgs& args);
c10::SymDimVector lse_sizes(const ProblemArgs& args);
c10::SymDimVector probs_sizes(const ProblemArgs& args);
c10::SymDimVector max_logits_sizes(const ProblemArgs& args);
// float32, or float64 for float64 elements.
at::ScalarType lse_type(const ProblemArgs& args);
// Of out, dq, dk and dv: the dtype of q or, for partial results, lse_type().
at::ScalarType result_type(const ProblemArgs& args);

// Checks the values of cu_seqlens, seqused_k, leftpad_k and block_table, which must be in host memory. Raises one
// ValueError with all reasons.
void validate_values(const ProblemArgs& args, const Problem& problem);

// The tensor itself if its last dimension is contiguous, otherwise a contiguous copy.
c10::MaybeOwned<Tensor> last_dim_contiguous(const Tensor& tensor);
bool is_last_dim_contiguous(const Tensor& tensor);

// The Problem of validated arguments. `readable` copies the tensors that kernels cannot read in place; this object owns
// the copies.
class PreparedProblem {
public:
    using Held = c10::MaybeOwned<Tensor>;
    explicit PreparedProblem(const ProblemArgs& args, Held (*readable)(const Tensor&) = last_dim_contiguous);
    const Problem& operator*() const { return problem_; }

protected:
    Problem problem_{};

private:
    const int32_t* metadata(const OptionalTensor& tensor, Held& held);
    DropoutParams dropout_of(const ProblemArgs& args);
    KeyRanges key_ranges_of(const ProblemArgs& args);

    Held q_, k_, v_, cu_seqlens_q_, cu_seqlens_k_, seqused_k_, leftpad_k_, block_table_, alibi_slopes_, rng_state_,
        q_starts_, k_starts_, key_ranges_, sinks_;
};

// Views of tensors with a contiguous last dimension; packed: no batch dimension.
TensorView view_of(const Tensor& tensor, bool packed);
RowView row_view_of(const Tensor& tensor, bool packed);

}  // namespace flash_attn
