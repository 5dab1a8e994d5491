// The ops on CUDA devices: validate, allocate, fill the rows that kernels leave unwritten, launch. Nothing here
// synchronises with the device (except with FLASH_ATTN_CHECK=1), so every call can be captured in a CUDA graph.
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <cstdlib>
#include <string_view>
#include "cuda/api.h"
#include "ops/asked_backend.h"
#include "ops/cuda_targets.h"
#include "ops/kvcache_append.h"
#include "ops/original_ops.h"
#include "ops/prepare.h"
#include "ops/results.h"
#include "policy/host_device.h"

namespace flash_attn {
namespace {

using c10::MaybeOwned;

constexpr int64_t kRowAlignment = 16;  // bytes; kernels load rows in 16-byte chunks

// Raises ValueError for arguments that the CPU supports and the CUDA kernels do not.
void require_supported(const ProblemArgs& args) {
    Reasons reasons(args);
    const bool cached = args.pass == Pass::kCache;
    const at::ScalarType type = args.q.scalar_type();
    if (type != at::kBFloat16 && type != at::kHalf) {
        reasons.add(cached   ? "q, k_cache, v_cache"
                    : args.v ? "q, k, v"
                             : "q, k",
                    "dtype bfloat16 or float16 on a CUDA device (cast them, call under torch.autocast, or move them to "
                    "the CPU, which takes every dtype)",
                    c10::getDtypeNames(type).first);
    }
    const auto check_head_dim = [&](const char* name, const char* what, int64_t size) {
        if (size <= cuda::kMaxHeadDim) return;
        const auto expected =
            c10::str(what, " of at most ", cuda::kMaxHeadDim, " on a CUDA device (the CPU takes up to ",
                     cached ? kMaxCacheHeadDim : kMaxHeadDim, ')');
        reasons.add(name, expected, size);
    };
    check_head_dim(cached ? "k_cache" : "q", "head_dim", args.k.size(-1));
    if (args.v) check_head_dim(cached ? "v_cache" : "v", "head_dim_v", args.v->size(-1));
    reasons.raise_if_any();
}

struct DeviceInfo {
    int compute_capability, smem_per_block, multiprocessors;
    int64_t l2_bytes;
    std::string unavailable_reason;  // why this build's kernels cannot run on the device; empty if they can
};

DeviceInfo query_device(int index) {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    const int compute_capability = 10 * properties.major + properties.minor;
    const std::string name = c10::str("cuda:", index, " (", properties.name, ')');
    return {compute_capability, int(properties.sharedMemPerBlockOptin), properties.multiProcessorCount,
            properties.l2CacheSize, unavailable_reason(name, compute_capability, FLASH_ATTN_CUDA_TARGETS)};
}

const DeviceInfo& device_info(c10::DeviceIndex index) {
    static const std::vector<DeviceInfo> all = [] {
        std::vector<DeviceInfo> devices;
        for (int i = 0; i < c10::cuda::device_count(); ++i) devices.push_back(query_device(i));
        return devices;
    }();
    return all.at(index);
}

bool is_set(const char* variable) {
    const char* value = std::getenv(variable);
    return value && *value && std::string_view(value) != "0";
}

// Makes the device of q current for the lifetime of the object, and gets its current stream.
class DeviceScope {
public:
    explicit DeviceScope(const ProblemArgs& args) : guard_(args.q.device()) {
        const DeviceInfo& info = device_info(args.q.device().index());
        TORCH_CHECK(info.unavailable_reason.empty(), "flash_attn: ", info.unavailable_reason);
        // CUDAGuard skips cudaSetDevice if the runtime reports this device as current, as it does for device 0 in a new
        // thread without a context (such as autograd's). Encoding tensor maps is a driver call and needs the context.
        C10_CUDA_CHECK(cudaSetDevice(args.q.device().index()));
        device_ = {info.compute_capability,
                   info.smem_per_block,
                   info.multiprocessors,
                   info.l2_bytes,
                   c10::cuda::getCurrentCUDAStream().stream(),
                   asked_backend()};
    }
    const cuda::Device& operator*() const { return device_; }

private:
    c10::cuda::CUDAGuard guard_;
    cuda::Device device_;
};

void check_launch(const char* error) { TORCH_CHECK(!error, "flash_attn: ", error); }

bool has_aligned_rows(const Tensor& tensor) {
    if (!is_last_dim_contiguous(tensor) || uintptr_t(tensor.const_data_ptr()) % kRowAlignment != 0) return false;
    for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
        const int64_t bytes = tensor.stride(dim) * int64_t(tensor.itemsize());
        if (tensor.size(dim) > 1 && bytes % kRowAlignment != 0) return false;
    }
    return true;
}

// The tensor itself if its rows are 16-byte aligned; otherwise a copy with padded rows, one more pass over memory.
MaybeOwned<Tensor> aligned_rows(const Tensor& tensor) {
    if (has_aligned_rows(tensor)) return MaybeOwned<Tensor>::borrowed(tensor);
    c10::DimVector sizes(tensor.sizes());
    sizes.back() = round_up<int64_t>(sizes.back(), kRowAlignment / int64_t(tensor.itemsize()));
    Tensor padded = at::empty(sizes, tensor.options()).narrow(-1, 0, tensor.size(-1));
    padded.copy_(tensor);
    return MaybeOwned<Tensor>::owned(std::move(padded));
}

bool wants_value_checks() {
    static const bool wanted = is_set("FLASH_ATTN_CHECK");
    return wanted;
}

// Whether FLASH_ATTN_CHECK=1 asks to validate lengths and tables like the CPU backend, which synchronises with the
// device. Not under stream capture, where device memory cannot be read.
bool checks_values() {
    return wants_value_checks() && c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

// A problem whose lengths and tables are copies in host memory.
class OnHost {
public:
    OnHost(const ProblemArgs& args, const Problem& problem) : problem_(problem) {
        copy(args.cu_seqlens_q, problem_.seqlens.cu_seqlens_q);
        copy(args.cu_seqlens_k, problem_.seqlens.cu_seqlens_k);
        copy(args.seqused_k, problem_.seqlens.seqused_k);
        copy(args.leftpad_k, problem_.seqlens.leftpad_k);
        copy(args.block_table, problem_.paged_kv.block_table);
        copy(args.q_starts, problem_.positions.q_starts);
        copy(args.k_starts, problem_.positions.k_starts);
        problem_.paged_kv.batch_stride = problem_.paged_kv.max_pages;
    }
    const Problem& operator*() const { return problem_; }

private:
    void copy(const OptionalTensor& tensor, const int32_t*& data) {
        if (tensor) data = copies_.emplace_back(tensor->cpu().contiguous()).const_data_ptr<int32_t>();
    }

    Problem problem_;
    c10::SmallVector<Tensor, 7> copies_;
};

void check_values(const ProblemArgs& args, const Problem& problem) {
    if (checks_values()) validate_values(args, *OnHost(args, problem));
}

void check_values(const KvCacheArgs& args, AppendParams append) {
    if (!checks_values()) return;
    const OnHost problem(args.attention(), append.problem);
    append.problem = *problem;
    validate_values(args, append);
}

Tensor make_workspace(const ProblemArgs& args, int64_t bytes) {
    return at::empty({bytes}, args.q.options().dtype(at::kByte));
}

FwdResult empty_result(const ProblemArgs& args, const Tensor* out = nullptr) {
    return {out ? *out : empty(out_sizes(args), args.q, result_type(args)), empty(lse_sizes(args), args.q, at::kFloat),
            initial_max_logits(args)};
}

void run_fwd(const ProblemArgs& args, const Problem& problem, const FwdResult& result, const DeviceScope& device) {
    const auto& [target, softmax_lse, max_logits] = result;
    const Target out(target);
    const bool packed = args.packed();
    if (packed || !has_pairs(problem)) {
        // The end of the last sequence is known only on the device.
        (*out).zero_();
        has_pairs(problem) ? void(softmax_lse.fill_(-kInfinity)) : fill_lse_without_keys(args, softmax_lse);
    }
    if (!has_pairs(problem)) return out.finish();
    FwdParams params{problem, view_of(*out, packed), row_view_of(softmax_lse, packed)};
    params.max_logits = data_or_null(max_logits);
    const Tensor workspace = make_workspace(args, cuda::fwd_workspace_bytes(params, *device));
    check_launch(cuda::run_fwd(params, workspace.mutable_data_ptr(), *device));
    out.finish();
}

FwdResult fwd_cuda(const FwdArgs& args) {
    validate(args);
    require_supported(args.problem);
    const DeviceScope device(args.problem);
    const PreparedProblem prepared(args.problem, aligned_rows);
    check_values(args.problem, *prepared);
    FwdResult result = empty_result(args.problem, args.out);
    run_fwd(args.problem, *prepared, result, device);
    return result;
}

// Appends by torch operations, then attends by the kernels of the forward pass: keys are not split, so that num_splits
// changes nothing. Caches whose rows are not aligned are copied after each append.
CacheResult fwd_kvcache_cuda(const KvCacheArgs& args) {
    validate(args);
    const ProblemArgs attention = args.attention();
    require_supported(attention);
    const DeviceScope device(attention);
    // What can fail comes before anything is written: FLASH_ATTN_BACKEND, lengths and tables, memory.
    check_values(args, PreparedKvCache(args).append_params());
    FwdResult result = empty_result(attention);
    const Tensor q = append_with_torch(args);
    const PreparedKvCache prepared({args, q, args.k_cache, args.v_cache}, aligned_rows);
    run_fwd(attention, *prepared, result, device);
    return {std::get<0>(std::move(result)), std::get<1>(std::move(result))};
}

// Zeroes all rows that run_bwd may leave unwritten.
void clear_outside(const Problem& problem, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                   const Tensor& dsoftmax_sum) {
    const Seqlens& s = problem.seqlens;
    if (s.cu_seqlens_q) {
        dq.zero_();
        dsoftmax_sum.zero_();
    }
    if (s.cu_seqlens_k || s.seqused_k || s.leftpad_k) {
        dk.zero_();
        dv.zero_();
    }
}

Tensor bwd_cuda(const BwdArgs& args) {
    validate(args);
    require_supported(args.problem);
    const DeviceScope device(args.problem);
    const PreparedProblem prepared(args.problem, aligned_rows);
    const Problem& problem = *prepared;
    check_values(args.problem, problem);

    Tensor dsoftmax_sum = empty(lse_sizes(args.problem), args.problem.q, at::kFloat);
    const bool packed = args.problem.packed();
    if (!has_pairs(problem)) {
        clear_gradients(args, dsoftmax_sum);
        return dsoftmax_sum;
    }
    const auto out = aligned_rows(args.out), dout = aligned_rows(args.dout);
    const auto softmax_lse = last_dim_contiguous(args.softmax_lse);
    const auto dlse = args.dlse ? last_dim_contiguous(*args.dlse) : MaybeOwned<Tensor>();
    const Target dq(args.dq), dk(args.dk), dv(args.dv);
    clear_outside(problem, *dq, *dk, *dv, dsoftmax_sum);
    const BwdParams params{problem,
                           view_of(*out, packed),
                           view_of(*dout, packed),
                           row_view_of(*softmax_lse, packed),
                           args.dlse ? row_view_of(*dlse, packed) : RowView{},
                           view_of(*dq, packed),
                           view_of(*dk, packed),
                           view_of(*dv, packed),
                           row_view_of(dsoftmax_sum, packed),
                           args.deterministic};
    const Tensor workspace = make_workspace(args.problem, cuda::bwd_workspace_bytes(params, *device));
    check_launch(cuda::run_bwd(params, workspace.mutable_data_ptr(), *device));
    for (const Target* gradient : {&dq, &dk, &dv}) gradient->finish();
    return dsoftmax_sum;
}

Tensor attn_probs_cuda(const ProbsArgs& args) {
    validate(args);
    require_supported(args.problem);
    const DeviceScope device(args.problem);
    const PreparedProblem prepared(args.problem, aligned_rows);
    const Problem& problem = *prepared;
    check_values(args.problem, problem);

    Tensor probs = empty(probs_sizes(args.problem), args.problem.q, args.problem.q.scalar_type()).zero_();
    if (has_pairs(problem)) {
        const auto softmax_lse = last_dim_contiguous(args.softmax_lse);
        const RowView lse = row_view_of(*softmax_lse, args.problem.packed());
        const ProbsParams params{problem, lse, probs.mutable_data_ptr()};
        const Tensor workspace = make_workspace(args.problem, cuda::attn_probs_workspace_bytes(params, *device));
        check_launch(cuda::run_attn_probs(params, workspace.mutable_data_ptr(), *device));
    }
    return probs;
}

// Uses the same copies as fwd_cuda for tensors that kernels cannot read in place.
Names explain_cuda(const FwdArgs& args) {
    validate(args);
    require_supported(args.problem);
    const DeviceScope device(args.problem);
    const PreparedProblem prepared(args.problem, aligned_rows);
    check_values(args.problem, *prepared);
    const Tensor out = empty(out_sizes(args.problem), args.problem.q, result_type(args.problem));
    const cuda::Explanation explanation =
        cuda::explain(FwdParams{*prepared, view_of(out, args.problem.packed()), {}}, *device);
    Names names{explanation.backend ? explanation.backend : ""};
    for (const cuda::Refusal& each : explanation.better) {
        names.emplace_back(each.backend);
        names.push_back(each.reason);
    }
    return names;
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
    implement_ops<fwd_cuda, bwd_cuda, attn_probs_cuda>(m);
    m.impl("fwd_kvcache", KvCacheOps::run<fwd_kvcache_cuda>);
    m.impl("_explain", Ops::run_explain<explain_cuda>);
}

}  // namespace flash_attn
