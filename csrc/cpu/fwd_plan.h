// The tasks of a forward pass. How one sequence is cut into tiles and chunks depends on its own shape only, never on the
// batch or the number of threads, and so do the bits of its result.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>
#include "cpu/kernel_table.h"
#include "policy/mask.h"
#include "policy/split.h"

namespace flash_attn::cpu {

// Longest task first, so that no thread is left with a long one at the end.
template <class Item> void longest_first(std::vector<Item>& items) {
    const auto longer = [](const Item& a, const Item& b) { return a.cost > b.cost; };
    if (!std::is_sorted(items.begin(), items.end(), longer)) std::stable_sort(items.begin(), items.end(), longer);
}

class FwdPlan {
public:
    int64_t partial_bytes = 0;  // of the workspace
    char* partials = nullptr;   // the workspace, set by the caller

    FwdPlan(const FwdParams& params, const Kernels& k) : p_(params.problem) {
        for (int batch = 0; batch < p_.batch_size; ++batch) {
            const Sequence seq = sequence_at(p_.seqlens, p_.paged_kv, batch);
            const WindowMask mask = WindowMask::of(p_, seq, batch, 0);
            if (seq.seqlen_q > 0 && is_grouped(seq))
                add_group(params, k, batch, seq, mask);
            else
                add_query_tiles(batch, seq, mask);
        }
        longest_first(tiles_);
        longest_first(chunks_);
        running_ = std::make_unique<std::atomic<int>[]>(groups_.size() * p_.num_heads_k);
        for (size_t i = 0; i < groups_.size() * p_.num_heads_k; ++i)
            running_[i].store(groups_[i / p_.num_heads_k].num_chunks, std::memory_order_relaxed);
    }

    int64_t num_tasks() const { return num_tile_tasks() + int64_t(chunks_.size()) * p_.num_heads_k; }

    void run(int64_t i, const FwdParams& params, const Kernels& k, void* scratch) {
        if (i < num_tile_tasks()) {
            FwdTask task = tiles_[i / p_.num_heads].task;
            task.first_head = int(i % p_.num_heads);
            return k.fwd(params, task, scratch);
        }
        i -= num_tile_tasks();
        run_chunk(chunks_[i / p_.num_heads_k], int(i % p_.num_heads_k), params, k, scratch);
    }

private:
    // Heads of a key head whose queries make one tile, split over keys.
    struct Group {
        int num_chunks;
        int64_t bytes, first_byte;  // of one partial result; of the partial results of the first key head
    };
    // A tile or a chunk for every head or key head.
    struct Item {
        FwdTask task;
        int64_t cost;  // number of (row, key) pairs
        int group, chunk;
    };

    int heads_per_group() const { return p_.num_heads / p_.num_heads_k; }
    int64_t num_tile_tasks() const { return int64_t(tiles_.size()) * p_.num_heads; }

    // Whether all queries of all heads of a key head fit in one tile. Dropout blocks are of one head.
    bool is_grouped(const Sequence& seq) const {
        return !p_.dropout.threshold && int64_t(seq.seqlen_q) * heads_per_group() <= kQueryTile;
    }

    void add_query_tiles(int batch, const Sequence& seq, const WindowMask& mask) {
        for (int query = 0; query < seq.seqlen_q; query += kQueryTile) {
            const int count = min(kQueryTile, seq.seqlen_q - query);
            const Range keys = mask.kv_range({query, query + count});
            tiles_.push_back({{batch, 0, 1, query, count, keys.begin, keys.end, nullptr},
                              int64_t(count) * max(keys.end - keys.begin, 0),
                              0,
                              0});
        }
    }

    void add_group(const FwdParams& params, const Kernels& k, int batch, const Sequence& seq, const WindowMask& mask) {
        const int heads = heads_per_group(), rows = seq.seqlen_q * heads;
        const Range keys = mask.kv_range({0, seq.seqlen_q});
        const int first = round_down(max(keys.begin, 0), kSplitAlignment);
        const int size = keys_per_chunk(max(keys.end - first, 0), rows, params.num_splits);
        const int num_chunks = max(ceil_div(keys.end - first, size), 1);
        for (int chunk = 0; chunk < num_chunks; ++chunk) {
            const Range part{max(first + chunk * size, keys.begin), min(first + (chunk + 1) * size, keys.end)};
            chunks_.push_back({{batch, 0, heads, 0, seq.seqlen_q, part.begin, part.end, nullptr},
                               int64_t(rows) * max(part.end - part.begin, 0),
                               int(groups_.size()),
                               chunk});
        }
        const int64_t bytes = num_chunks > 1 ? int64_t(k.partial_bytes(params, rows)) : 0;
        groups_.push_back({num_chunks, bytes, partial_bytes});
        partial_bytes += bytes * num_chunks * p_.num_heads_k;
    }

    // The last chunk of a tile to finish merges them all, in order.
    void run_chunk(const Item& item, int head_k, const FwdParams& params, const Kernels& k, void* scratch) {
        const Group& group = groups_[item.group];
        FwdTask task = item.task;
        task.first_head = head_k * heads_per_group();
        if (group.num_chunks == 1) return k.fwd(params, task, scratch);
        char* const first = partials + group.first_byte + head_k * group.num_chunks * group.bytes;
        task.partial = first + item.chunk * group.bytes;
        k.fwd(params, task, scratch);
        std::atomic<int>& running = running_[int64_t(item.group) * p_.num_heads_k + head_k];
        if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) k.merge(params, {task, group.num_chunks, first});
    }

    const Problem& p_;
    std::vector<Item> tiles_, chunks_;
    std::vector<Group> groups_;
    std::unique_ptr<std::atomic<int>[]> running_;  // [group][key head]: chunks that have not finished
};

}  // namespace flash_attn::cpu
