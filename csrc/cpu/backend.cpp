// Chooses the instruction set, splits a pass into tasks and runs them on the host's threads.
#include "cpu/backend.h"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "cpu/fwd_plan.h"
#include "cpu/kernel_table.h"
#include "cpu/range_blocks.h"

namespace flash_attn::cpu {
namespace {

struct InstructionSet {
    const char* name;
    Kernels (*kernels)(ElementType);
    bool supported, quick;  // one that is not quick is used only on request
};

InstructionSet pick_instruction_set() {
    const InstructionSet sets[] = {
#if defined(__x86_64__)
        {"avx512_bf16", avx512_bf16::kernels,
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         !__builtin_cpu_is("intel")},  // there, dot products of pairs run at half the speed of fp32 multiply-adds
        {"avx512", avx512::kernels,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         true},
        {"avx2", avx2::kernels,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi2"),
         true},
#endif
        {"base", base::kernels, true, true},
    };
    // Ordered from best to least; if the processor lacks the requested set, the next one that it supports is used.
    const char* const asked = std::getenv("FLASH_ATTN_CPU_ISA");
    const bool any = !asked || std::none_of(std::begin(sets), std::end(sets),
                                            [&](const auto& s) { return !std::strcmp(s.name, asked); });
    bool reached = any;
    for (const InstructionSet& s : sets) {
        reached = reached || !std::strcmp(s.name, asked);
        if (reached && s.supported && (s.quick || !any)) return s;
    }
    return sets[std::size(sets) - 1];
}

const InstructionSet& chosen() {
    static const InstructionSet set = pick_instruction_set();
    return set;
}

template <class F> struct TaskOf final : Task {
    explicit TaskOf(const F& f) : function(f) {}
    void run(int64_t index, void* scratch) const override { function(index, scratch); }
    const F& function;
};
template <class F> void parallel(Host& host, int64_t count, size_t scratch_bytes, const F& function) {
    if (count > 0) host.parallel(count, scratch_bytes, TaskOf<F>(function));
}
// function(batch, head, scratch) for every head of every sequence.
template <class F> void for_each_head(Host& host, const Problem& p, size_t scratch_bytes, const F& function) {
    parallel(host, int64_t(p.batch_size) * p.num_heads, scratch_bytes,
             [&](int64_t i, void* scratch) { function(int(i / p.num_heads), int(i % p.num_heads), scratch); });
}

// function(mask, block, index) for every block of the queries or keys of every sequence, of which length(sequence) says
// how many there are. Many blocks are one task.
template <class Length, class F>
void for_each_block(Host& host, const Problem& p, int most_blocks, Length length, const F& function) {
    constexpr int64_t kBlocksPerTask = 64;
    const int64_t count = int64_t(p.batch_size) * most_blocks;
    parallel(host, ceil_div(count, kBlocksPerTask), 0, [&](int64_t task, void*) {
        for (int64_t i = task * kBlocksPerTask; i < min(count, (task + 1) * kBlocksPerTask); ++i) {
            const int batch = int(i / most_blocks), block = int(i % most_blocks);
            const Sequence seq = sequence_at(p, batch);
            if (block * kRangeBlock < length(seq)) function(RangeMask::of(p, seq, batch, 0), block, i);
        }
    });
}

// Sums up the key ranges of a problem, if it has any; for_keys: also for each block of keys.
void sum_up_ranges(Problem& p, bool for_keys, Host& host) {
    KeyRanges& r = p.key_ranges;
    if (!r.ranges) return;
    const int of_queries = RangeMask::num_query_blocks(p), of_keys = for_keys ? RangeMask::num_key_blocks(p) : 0;
    auto* const query_blocks =
        static_cast<QueryBlock*>(host.workspace(sizeof(QueryBlock) * size_t(p.batch_size) * of_queries));
    auto* const key_blocks = static_cast<KeyBlock*>(host.workspace(sizeof(KeyBlock) * size_t(p.batch_size) * of_keys));
    r.query_blocks = query_blocks, r.key_blocks = key_blocks;
    for_each_block(
        host, p, of_queries, [](const Sequence& seq) { return seq.seqlen_q; },
        [&](const RangeMask& mask, int block, int64_t i) { query_blocks[i] = query_block(mask, block); });
    for_each_block(
        host, p, of_keys, [](const Sequence& seq) { return seq.seqlen_k; },
        [&](const RangeMask& mask, int block, int64_t i) { key_blocks[i] = key_block(mask, block); });
}

// Number of tasks that share the keys of one sequence and head. Each task has a dQ buffer of its own, so splits are
// only used where there are too few heads to keep threads busy. Depends on the shape of one sequence, never on the
// batch or the number of threads: so the summation order, and every bit of dQ, does not depend on them either.
int num_splits(const Problem& p, int seqlen_k) { return clamp(min(16 / p.num_heads_k, ceil_div(seqlen_k, 256)), 1, 8); }

// Consecutive sequences whose dQ buffers are allocated at the same time.
struct Wave {
    int begin, end;
    int64_t dq_accum_bytes;
};

int64_t dq_accum_bytes(const Problem& p, const Kernels& k, int batch) {
    const Sequence seq = sequence_at(p, batch);
    return int64_t(num_splits(p, seq.seqlen_k)) * p.num_heads * seq.seqlen_q * k.head_dim_padded(p.head_dim) *
           k.compute_bytes;
}

std::vector<Wave> plan_waves(const Problem& p, const Kernels& k, int num_threads) {
    constexpr int64_t kEnoughBytes = 32 << 20;  // this much may always be allocated
    const int64_t enough_tasks = 4 * int64_t(num_threads);
    std::vector<Wave> waves;
    int64_t tasks = 0;
    for (int batch = 0; batch < p.batch_size; ++batch) {
        const int64_t bytes = dq_accum_bytes(p, k, batch);
        const bool full =
            waves.empty() || (waves.back().dq_accum_bytes + bytes > kEnoughBytes && tasks >= enough_tasks);
        if (full) {
            waves.push_back({batch, batch, 0});
            tasks = 0;
        }
        waves.back().end = batch + 1;
        waves.back().dq_accum_bytes += bytes;
        tasks += int64_t(p.num_heads_k) * num_splits(p, sequence_at(p, batch).seqlen_k);
    }
    return waves;
}

struct CostedTask {
    BwdTask task;
    int64_t cost;
};

void run_wave(const BwdParams& params, const Kernels& k, const Wave& wave, char* dq_accum, Host& host) {
    const Problem& p = params.problem;
    std::vector<CostedTask> tasks;
    std::vector<BwdTask> sequences;
    for (int batch = wave.begin; batch < wave.end; ++batch) {
        const Sequence seq = sequence_at(p, batch);
        const int splits = num_splits(p, seq.seqlen_k);
        sequences.push_back({batch, 0, 0, splits, dq_accum});
        for (int i = 0; i < p.num_heads_k * splits; ++i)
            tasks.push_back({{batch, i / splits, i % splits, splits, dq_accum}, int64_t(seq.seqlen_q) * seq.seqlen_k});
        dq_accum += dq_accum_bytes(p, k, batch);
    }
    longest_first(tasks);
    parallel(host, int64_t(tasks.size()), k.bwd_scratch(params),
             [&](int64_t i, void* scratch) { k.bwd(params, tasks[i].task, scratch); });
    parallel(host, int64_t(sequences.size()) * p.num_heads, 0,
             [&](int64_t i, void*) { k.bwd_postprocess(params, sequences[i / p.num_heads], int(i % p.num_heads)); });
}

}  // namespace

const char* instruction_set() { return chosen().name; }

void run_fwd(const FwdParams& asked, Host& host) {
    FwdParams params = asked;
    sum_up_ranges(params.problem, false, host);
    const Kernels k = chosen().kernels(params.problem.type);
    const FwdPlan plan(params, k, host.num_threads());
    char* const partials = static_cast<char*>(host.workspace(plan.partial_bytes()));
    parallel(host, plan.num_tasks(), k.fwd_scratch(params),
             [&](int64_t i, void* scratch) { plan.run(i, partials, scratch); });
}

void append(const AppendParams& params, Host& host) {
    const Kernels k = chosen().kernels(params.problem.type);
    const Seqlens& s = params.problem.seqlens;
    const int rows = max(s.seqlen_new, params.q_rotated.data ? s.seqlen_q : 0);
    parallel(host, int64_t(params.problem.batch_size) * rows, 0,
             [&](int64_t i, void*) { k.append(params, int(i / rows), int(i % rows)); });
}

void run_bwd(const BwdParams& asked, Host& host) {
    BwdParams params = asked;
    sum_up_ranges(params.problem, true, host);
    const Problem& p = params.problem;
    const Kernels k = chosen().kernels(p.type);
    for_each_head(host, p, k.bwd_preprocess_scratch(params),
                  [&](int batch, int head, void* scratch) { k.bwd_preprocess(params, batch, head, scratch); });
    const std::vector<Wave> waves = plan_waves(p, k, host.num_threads());
    int64_t most = 0;
    for (const Wave& wave : waves) most = max(most, wave.dq_accum_bytes);
    char* dq_accum = static_cast<char*>(host.workspace(size_t(most)));
    for (const Wave& wave : waves) run_wave(params, k, wave, dq_accum, host);
}

void run_attn_probs(const ProbsParams& asked, Host& host) {
    ProbsParams params = asked;
    sum_up_ranges(params.problem, false, host);
    const Kernels k = chosen().kernels(params.problem.type);
    for_each_head(host, params.problem, 0, [&](int batch, int head, void*) { k.attn_probs(params, batch, head); });
}

}  // namespace flash_attn::cpu
