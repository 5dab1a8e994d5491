// csrc/cuda/api.h as C functions, for test_backends.py: which backend runs a problem, why not a better one, what memory
// it asks for. Nothing is launched, and no tensor is looked at.
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include "cuda/backend.h"
#include "cuda/instances.h"
#include "cuda/sm90/config.h"
#include "policy/mask.h"

namespace {

using namespace flash_attn;

// Dense, bfloat16, contiguous; all that a test may change, by name.
struct Call {
    static constexpr int64_t kBatch = 2, kRows = 100, kHeads = 4, kHeadDim = 64;
    cuda::Device device{90, 232448, 132, 50 << 20, nullptr};
    BwdParams params{};
    std::map<std::string, int32_t*> numbers;
    std::map<std::string, TensorView*> tensors;
    std::string backend;

    Call() {
        Problem& p = params.problem;
        p.type = ElementType::kBFloat16;
        p.batch_size = kBatch, p.num_heads = p.num_heads_k = kHeads;
        p.head_dim = p.head_dim_v = kHeadDim;
        p.seqlens.seqlen_q = p.seqlens.seqlen_k = kRows;
        p.window = {kMaxSeqlen, kMaxSeqlen};
        p.chunks = make_chunks(0);
        numbers = {{"compute_capability", &device.compute_capability},
                   {"smem_per_block", &device.smem_per_block},
                   {"type", reinterpret_cast<int32_t*>(&p.type)},
                   {"head_dim", &p.head_dim},
                   {"head_dim_v", &p.head_dim_v},
                   {"seqlen_k", &p.seqlens.seqlen_k},
                   {"k_start", &p.positions.k_start},
                   {"window_right", &p.window.right}};
        tensors = {
            {"q", &p.q},        {"k", &p.k},        {"v", &p.v},       {"out", &params.out}, {"dout", &params.dout},
            {"dq", &params.dq}, {"dk", &params.dk}, {"dv", &params.dv}};
        for (const auto& [name, view] : tensors)
            *view = {reinterpret_cast<void*>(1024), kRows * kHeads * kHeadDim, kHeads * kHeadDim, kHeadDim};
    }
    void change(const std::string& key, const std::string& value) {
        Problem& p = params.problem;
        if (key == "backend") {
            backend = value;
            device.backend = backend.c_str();
        } else if (key == "paged") {
            p.paged_kv.block_table = reinterpret_cast<const int32_t*>(1024);
        } else if (key == "q_start") {
            p.positions.given = true;
            p.positions.q_start = std::stoi(value);
        } else if (key == "float_results") {
            p.float_results = std::stoi(value) != 0;
        } else if (key == "key_ranges") {
            p.key_ranges.ranges = reinterpret_cast<const int32_t*>(1024);
        } else if (key == "softcap") {
            p.score.softcap = std::stod(value);
        } else if (numbers.count(key)) {
            *numbers.at(key) = std::stoi(value);
        } else {
            change(*tensors.at(key.substr(0, key.find('.'))), key.substr(key.find('.') + 1), std::stoll(value));
        }
    }
    static void change(TensorView& view, const std::string& field, int64_t value) {
        if (field == "data") view.data = reinterpret_cast<void*>(value);
        if (field == "batch_stride") view.batch_stride = value;
        if (field == "row_stride") view.row_stride = value;
        if (field == "head_stride") view.head_stride = value;
    }
    FwdParams fwd() const { return {params.problem, params.out, {}}; }
};

// "head_dim=40 q.row_stride=3".
Call call_with(const char* changes) {
    Call call;
    std::istringstream words(changes);
    for (std::string word; words >> word;) call.change(word.substr(0, word.find('=')), word.substr(word.find('=') + 1));
    return call;
}

void put(const std::string& from, char* text, size_t size) {
    std::strncpy(text, from.c_str(), size - 1);
    text[size - 1] = '\0';
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// "sm90 sm_90a\nsm80 \n"
EXPORTED void backends(char* text, size_t size) {
    std::string all;
    for (const cuda::BackendInfo& each : cuda::backends()) all += std::string(each.name) + ' ' + each.code + '\n';
    put(all, text, size);
}

// "sm80\nsm90: the reason\n"; the first line is empty if there is none.
EXPORTED void explain(const char* pass, const char* changes, char* text, size_t size) {
    const Call call = call_with(changes);
    const bool is_fwd = pass == std::string("fwd"), is_bwd = pass == std::string("bwd");
    const cuda::Explanation e = is_fwd   ? cuda::explain(call.fwd(), call.device)
                                : is_bwd ? cuda::explain(call.params, call.device)
                                         : cuda::explain(ProbsParams{call.params.problem, {}, nullptr}, call.device);
    std::string all = (e.backend ? e.backend : std::string()) + '\n';
    for (const cuda::Refusal& each : e.better) all += std::string(each.backend) + ": " + each.reason + '\n';
    put(all, text, size);
}

// What running it comes to, where no kernel has been compiled.
EXPORTED void run_fwd(const char* changes, char* text, size_t size) {
    const Call call = call_with(changes);
    put(cuda::run_fwd(call.fwd(), nullptr, call.device), text, size);
}

// Of the forward pass for compute capability 9.0 with the larger query tiles.
EXPORTED double estimated_time(const char* changes) {
    const Problem p = call_with(changes).params.problem;
    return estimated_time(p, fwd_shape_sm90(p.head_dim, p.head_dim_v, false, false));
}

EXPORTED int64_t workspace_bytes(const char* pass, const char* changes) {
    const Call call = call_with(changes);
    if (pass == std::string("probs"))
        return cuda::attn_probs_workspace_bytes({call.params.problem, {}, nullptr}, call.device);
    return pass == std::string("fwd") ? cuda::fwd_workspace_bytes(call.fwd(), call.device)
                                      : cuda::bwd_workspace_bytes(call.params, call.device);
}

// There is no kernel in this library.
const char* cuda::make_range_blocks(const Problem&, QueryBlock*, KeyBlock*, const Device&) {
    return "there are no kernels for key ranges";
}
