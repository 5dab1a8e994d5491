// The ops on the CPU: validate, allocate, fill the rows outside sequences, run the kernels.
#include <torch/library.h>
#include "cpu/backend.h"
#include "cuda/api.h"
#include "ops/asked_backend.h"
#include "ops/cpu_host.h"
#include "ops/kvcache.h"
#include "ops/original_ops.h"
#include "ops/prepare.h"
#include "ops/results.h"

namespace flash_attn {
namespace {

// Fills the rows of a packed tensor after the last sequence.
void fill_tail(const Tensor& tensor, int64_t dim, const int32_t* cu_seqlens, int32_t batch_size, double value) {
    if (!cu_seqlens) return;
    const int64_t used = cu_seqlens[batch_size], total = tensor.size(dim);
    if (used < total) tensor.narrow(dim, used, total - used).fill_(value);
}

FwdResult fwd_cpu(const FwdArgs& args) {
    validate(args);
    const PreparedProblem prepared(args.problem);
    const Problem& problem = *prepared;
    validate_values(args.problem, problem);

    Tensor result = args.out ? *args.out : empty(out_sizes(args.problem), args.problem.q, result_type(args.problem));
    Tensor softmax_lse = empty(lse_sizes(args.problem), args.problem.q, lse_type(args.problem));
    Tensor max_logits = initial_max_logits(args.problem);
    if (!has_pairs(problem)) {
        result.zero_();
        fill_lse_without_keys(args.problem, softmax_lse);
        return {std::move(result), std::move(softmax_lse), std::move(max_logits)};
    }
    const bool packed = args.problem.packed();
    const Target out(result);
    fill_tail(*out, 0, problem.seqlens.cu_seqlens_q, problem.batch_size, 0);
    fill_tail(softmax_lse, 1, problem.seqlens.cu_seqlens_q, problem.batch_size, -kInfinity);
    TorchHost host;
    FwdParams params{problem, view_of(*out, packed), row_view_of(softmax_lse, packed)};
    params.max_logits = data_or_null(max_logits);
    cpu::run_fwd(params, host);
    out.finish();
    return {std::move(result), std::move(softmax_lse), std::move(max_logits)};
}

CacheResult fwd_kvcache_cpu(const KvCacheArgs& args) {
    validate(args);
    PreparedKvCache prepared(args);
    validate_values(args, prepared.append_params());

    const ProblemArgs attention = args.attention();
    const Problem& problem = *prepared;
    Tensor out = empty(out_sizes(attention), args.q, args.q.scalar_type());
    Tensor softmax_lse = empty(lse_sizes(attention), args.q, lse_type(attention));
    Tensor q_rotated;
    if (prepared.rotates()) {
        q_rotated = empty(c10::SymDimVector(args.q.sym_sizes()), args.q, args.q.scalar_type());
        prepared.rotate_queries_into(q_rotated);
    }
    TorchHost host;
    if (args.k) cpu::append(prepared.append_params(), host);
    if (has_pairs(problem)) {
        cpu::run_fwd({problem, view_of(out, false), row_view_of(softmax_lse, false), int32_t(args.num_splits),
                      /*inference=*/true},
                     host);
    } else {
        out.zero_();
        fill_lse_without_keys(attention, softmax_lse);
    }
    return {std::move(out), std::move(softmax_lse)};
}

// Zeroes all rows that run_bwd does not write.
void clear_outside(const Problem& problem, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    const Seqlens& s = problem.seqlens;
    fill_tail(dq, 0, s.cu_seqlens_q, problem.batch_size, 0);
    if (s.seqused_k || s.leftpad_k) {
        dk.zero_();
        dv.zero_();
        return;
    }
    fill_tail(dk, 0, s.cu_seqlens_k, problem.batch_size, 0);
    fill_tail(dv, 0, s.cu_seqlens_k, problem.batch_size, 0);
}

Tensor bwd_cpu(const BwdArgs& args) {
    validate(args);
    const PreparedProblem prepared(args.problem);
    const Problem& problem = *prepared;
    validate_values(args.problem, problem);

    Tensor dsoftmax_sum = empty(lse_sizes(args.problem), args.problem.q, lse_type(args.problem));
    if (has_pairs(problem)) {
        const bool packed = args.problem.packed();
        const auto out = last_dim_contiguous(args.out), dout = last_dim_contiguous(args.dout);
        const auto softmax_lse = last_dim_contiguous(args.softmax_lse);
        const auto dlse = args.dlse ? last_dim_contiguous(*args.dlse) : c10::MaybeOwned<Tensor>();
        const Target dq(args.dq), dk(args.dk), dv(args.dv);
        clear_outside(problem, *dq, *dk, *dv);
        TorchHost host;
        cpu::run_bwd({problem, view_of(*out, packed), view_of(*dout, packed), row_view_of(*softmax_lse, packed),
                      args.dlse ? row_view_of(*dlse, packed) : RowView{}, view_of(*dq, packed), view_of(*dk, packed),
                      view_of(*dv, packed), row_view_of(dsoftmax_sum, packed), args.deterministic},
                     host);
        for (const Target* gradient : {&dq, &dk, &dv}) gradient->finish();
    } else {
        clear_gradients(args, dsoftmax_sum);
    }
    fill_tail(dsoftmax_sum, 1, problem.seqlens.cu_seqlens_q, problem.batch_size, 0);
    return dsoftmax_sum;
}

Tensor attn_probs_cpu(const ProbsArgs& args) {
    validate(args);
    const PreparedProblem prepared(args.problem);
    const Problem& problem = *prepared;
    validate_values(args.problem, problem);

    Tensor probs = empty(probs_sizes(args.problem), args.problem.q, args.problem.q.scalar_type()).zero_();
    if (has_pairs(problem)) {
        const auto softmax_lse = last_dim_contiguous(args.softmax_lse);
        TorchHost host;
        cpu::run_attn_probs({problem, row_view_of(*softmax_lse, args.problem.packed()), probs.mutable_data_ptr()},
                            host);
    }
    return probs;
}

Names explain_cpu(const FwdArgs& args) {
    validate(args);
    const PreparedProblem prepared(args.problem);
    validate_values(args.problem, *prepared);
    Names names{kCpuBackend};
    for (const cuda::BackendInfo& each : cuda::backends()) {
        names.emplace_back(each.name);
        names.emplace_back(*each.code ? "the tensors are on the CPU" : "it is not in this build");
    }
    return names;
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
    implement_ops<fwd_cpu, bwd_cpu, attn_probs_cpu>(m);
    m.impl("fwd_kvcache", KvCacheOps::run<fwd_kvcache_cpu>);
    m.impl("_explain", Ops::run_explain<explain_cpu>);
}

}  // namespace flash_attn
