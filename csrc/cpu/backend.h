// The CPU backend's interface to the ops. No torch: the caller provides threads and memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include "problem.h"

namespace flash_attn::cpu {

// The tasks of one parallel loop; scratch is private to the executing thread.
struct Task {
    virtual void run(int64_t index, void* scratch) const = 0;

protected:
    ~Task() = default;
};

struct Host {
    virtual int num_threads() const = 0;
    // Runs task.run(i, scratch) for every i in [0, count), in any order and on any thread, and returns when all have
    // finished. scratch is 64-byte aligned, scratch_bytes long and uninitialised.
    virtual void parallel(int64_t count, size_t scratch_bytes, const Task& task) = 0;
    // Uninitialised memory, 64-byte aligned, valid until the pass returns.
    virtual void* workspace(size_t bytes) = 0;

protected:
    ~Host() = default;
};

// The instruction set in use: the best that this processor supports, or a lesser one chosen by FLASH_ATTN_CPU_ISA
// ("base", "avx2", "avx512", "avx512_bf16"), read once.
const char* instruction_set();

// Writes all rows of all sequences; rows of packed tensors outside every sequence are not written.
void run_fwd(const FwdParams& params, Host& host);
void run_bwd(const BwdParams& params, Host& host);
// Writes new rows into a KV cache, and rotated queries.
void append(const AppendParams& params, Host& host);
void run_attn_probs(const ProbsParams& params, Host& host);

}  // namespace flash_attn::cpu
