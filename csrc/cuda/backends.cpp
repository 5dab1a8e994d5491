// The table of backends, best first, and the choice among them: the entry points of cuda/api.h.
#include <cstring>
#include <type_traits>
#include <utility>
#include "cuda/backend.h"
#include "policy/range_mask.h"

namespace flash_attn::cuda {
namespace {

const Backend& (*const kBackends[])() = {
    backend<90>,
    backend<80>,
};

const Pass<FwdParams>& pass_of(const Backend& backend, const FwdParams&) { return backend.fwd; }
const Pass<BwdParams>& pass_of(const Backend& backend, const BwdParams&) { return backend.bwd; }
const Pass<ProbsParams>& pass_of(const Backend& backend, const ProbsParams&) { return backend.attn_probs; }

// Why a backend cannot run a problem; empty if it can.
template <class Params> std::string why_not(const Backend& backend, const Params& params, const Device& device) {
    if (device.backend && std::strcmp(device.backend, backend.name) != 0) return "FLASH_ATTN_BACKEND asks for another";
    if (!*backend.code) return "it is not in this build";
    const Pass<Params>& pass = pass_of(backend, params);
    return pass.run ? pass.why_not(params, device) : "it has no kernels for this pass";
}

// The best backend that can run a problem; null if none can.
template <class Params> const Backend* choose(const Params& params, const Device& device) {
    for (const auto& get : kBackends)
        if (why_not(get(), params, device).empty()) return &get();
    return nullptr;
}

template <class Params> Explanation explain_choice(const Params& params, const Device& device) {
    Explanation explanation{};
    for (const auto& get : kBackends) {
        std::string reason = why_not(get(), params, device);
        if (reason.empty()) {
            explanation.backend = get().name;
            break;
        }
        explanation.better.push_back({get().name, std::move(reason)});
    }
    return explanation;
}

template <class Params> const char* refusal(const Params& params, const Device& device) {
    thread_local std::string text;
    text = device.backend ? "FLASH_ATTN_BACKEND=" : "no backend can run this";
    for (const Refusal& each : explain_choice(params, device).better) {
        if (!device.backend)
            text += std::string("; ") + each.backend + ": " + each.reason;
        else if (!std::strcmp(device.backend, each.backend))
            text += std::string(each.backend) + ": " + each.reason;
    }
    return text.c_str();
}

// Byte offsets of the tables of key ranges, at the start of the workspace; that of the backend follows.
struct RangeTables {
    int64_t key_blocks = 0, end = 0;

    explicit RangeTables(const Problem& p) {
        if (!p.key_ranges.ranges) return;
        constexpr int64_t kAlignment = 256;
        key_blocks = int64_t(sizeof(QueryBlock)) * p.batch_size * RangeMask::num_query_blocks(p);
        end =
            round_up(key_blocks + int64_t(sizeof(KeyBlock)) * p.batch_size * RangeMask::num_key_blocks(p), kAlignment);
    }
};

// Only the backward pass asks which queries see a key.
template <class Params>
const char* run_with_ranges(const Backend& backend, Params params, char* workspace, const Device& device) {
    const RangeTables tables(params.problem);
    auto* const query_blocks = reinterpret_cast<QueryBlock*>(workspace);
    auto* const key_blocks = reinterpret_cast<KeyBlock*>(workspace + tables.key_blocks);
    params.problem.key_ranges.query_blocks = query_blocks;
    params.problem.key_ranges.key_blocks = key_blocks;
    constexpr bool kIsBackward = std::is_same_v<Params, BwdParams>;
    const char* const error =
        backend.make_range_blocks(params.problem, query_blocks, kIsBackward ? key_blocks : nullptr, device);
    return error ? error : pass_of(backend, params).run(params, workspace + tables.end, device);
}

template <class Params> const char* run(const Params& params, void* workspace, const Device& device) {
    const Backend* const chosen = choose(params, device);
    if (!chosen) return refusal(params, device);
    if (params.problem.key_ranges.ranges)
        return run_with_ranges(*chosen, params, static_cast<char*>(workspace), device);
    return pass_of(*chosen, params).run(params, workspace, device);
}

// A problem that no backend can run needs no workspace: running it returns the error.
template <class Params> int64_t workspace_bytes(const Params& params, const Device& device) {
    const Backend* const chosen = choose(params, device);
    if (!chosen) return 0;
    return RangeTables(params.problem).end + pass_of(*chosen, params).workspace_bytes(params, device);
}

}  // namespace

const char* run_fwd(const FwdParams& params, void* workspace, const Device& device) {
    return run(params, workspace, device);
}
const char* run_bwd(const BwdParams& params, void* workspace, const Device& device) {
    return run(params, workspace, device);
}
const char* run_attn_probs(const ProbsParams& params, void* workspace, const Device& device) {
    return run(params, workspace, device);
}

int64_t fwd_workspace_bytes(const FwdParams& params, const Device& device) { return workspace_bytes(params, device); }
int64_t bwd_workspace_bytes(const BwdParams& params, const Device& device) { return workspace_bytes(params, device); }
int64_t attn_probs_workspace_bytes(const ProbsParams& params, const Device& device) {
    return workspace_bytes(params, device);
}

std::vector<BackendInfo> backends() {
    std::vector<BackendInfo> all;
    for (const auto& get : kBackends) all.push_back({get().name, get().code});
    return all;
}

Explanation explain(const FwdParams& params, const Device& device) { return explain_choice(params, device); }
Explanation explain(const BwdParams& params, const Device& device) { return explain_choice(params, device); }
Explanation explain(const ProbsParams& params, const Device& device) { return explain_choice(params, device); }

}  // namespace flash_attn::cuda
