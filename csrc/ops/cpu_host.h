// torch's thread pool and allocator as the Host of the CPU backend.
#pragma once
#include <ATen/Parallel.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/SmallVector.h>
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include "cpu/backend.h"

namespace flash_attn {

struct FreeCpu {
    void operator()(void* data) const { c10::free_cpu(data); }
};
using Buffer = std::unique_ptr<void, FreeCpu>;  // 64-byte aligned

// For tests: with FLASH_ATTN_CPU_POISON=1, read once, memory is filled with NaN when allocated, and scratch again for
// every task, so reads of uninitialised memory show up as NaN. All bits set are NaN in every type.
inline bool poisons_memory() {
    static const bool poisons = [] {
        const char* asked = std::getenv("FLASH_ATTN_CPU_POISON");
        return asked && !std::strcmp(asked, "1");
    }();
    return poisons;
}
inline void* handed_out(void* data, size_t bytes) {
    if (poisons_memory() && bytes > 0) std::memset(data, 0xff, bytes);
    return data;
}

// Scratch of one thread for one parallel loop. A thread caches its allocation for the next loop unless it is large.
class Scratch {
public:
    explicit Scratch(size_t bytes) {
        if (bytes > kKeptBytes) {
            own_.reset(c10::alloc_cpu(bytes));
            data_ = own_.get();
            return;
        }
        thread_local Buffer kept;
        thread_local size_t kept_bytes = 0;
        if (bytes > kept_bytes) {
            kept_bytes = 0;
            kept.reset(c10::alloc_cpu(bytes));
            kept_bytes = bytes;
        }
        data_ = kept.get();
    }
    void* data() const { return data_; }

private:
    static constexpr size_t kKeptBytes = 2 << 20;
    Buffer own_;
    void* data_;
};

class TorchHost final : public cpu::Host {
public:
    int num_threads() const override { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

    void parallel(int64_t count, size_t scratch_bytes, const cpu::Task& task) override {
        const int64_t workers = count > 1 ? std::min<int64_t>(count, num_threads()) : count;
        std::atomic<int64_t> next{0};
        const auto work = [&](int64_t, int64_t) {
            const Scratch scratch(scratch_bytes);
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                task.run(i, handed_out(scratch.data(), scratch_bytes));
        };
        if (workers > 1) {
            at::parallel_for(0, workers, 1, work);
        } else if (workers == 1) {
            work(0, 1);
        }
    }
    void* workspace(size_t bytes) override {
        return handed_out(workspaces_.emplace_back(c10::alloc_cpu(bytes)).get(), bytes);
    }

private:
    c10::SmallVector<Buffer, 4> workspaces_;
};

}  // namespace flash_attn
