// The CPU backend as the ops see it. Torch-free: threads and memory come from the caller.
#pragma once
#include <cstddef>
#include <cstdint>
#include "problem.h"

namespace flash_attn::cpu {

// One piece of work of a pass; scratch is private to the thread that runs it.
struct Task {
    virtual void run(int64_t index, void* scratch) const = 0;

protected:
    ~Task() = default;
};

struct Host {
    virtual int num_threads() const = 0;
    // Runs task.run(i, scratch) for every i in [0, count), in any order and on any thread, and returns when all are
    // done. scratch is 64-byte aligned, scratch_bytes long and not initialised.
    virtual void parallel(int64_t count, size_t scratch_bytes, const Task& task) = 0;
    // 64-byte aligned memory, not initialised, that lives until the pass returns.
    virtual void* workspace(size_t bytes) = 0;

protected:
    ~Host() = default;
};

// The instruction set in use: the best that this processor has, or a lesser one named by FLASH_ATTN_CPU_ISA
// ("base", "avx2", "avx512", "avx512_bf16"), read once.
const char* instruction_set();

// All rows of sequences are written; rows of packed tensors outside of every sequence are not touched.
void run_fwd(const FwdParams& params, Host& host);
void run_bwd(const BwdParams& params, Host& host);
void run_attn_probs(const ProbsParams& params, Host& host);

}  // namespace flash_attn::cpu
