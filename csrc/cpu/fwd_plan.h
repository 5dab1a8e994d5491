// The tasks of a forward pass. How one sequence is cut into tiles and chunks depends on its own shape only, never on
// the batch or the number of threads, and so do the bits of its result.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>
#include "cpu/kernel_table.h"
#include "policy/range_mask.h"
#include "policy/split.h"

namespace flash_attn::cpu {

// Longest task first, so that no thread is left with a long one at the end.
template <class Item> void longest_first(std::vector<Item>& items) {
    const auto longer = [](const Item& a, const Item& b) { return a.cost > b.cost; };
    if (!std::is_sorted(items.begin(), items.end(), longer)) std::stable_sort(items.begin(), items.end(), longer);
}

class FwdPlan {
public:
    FwdPlan(const FwdParams& params, const Kernels& kernels, int num_threads)
        : params_(params), p_(params.problem), k_(kernels) {
        for (int batch = 0; batch < p_.batch_size; ++batch) {
            const Sequence seq = sequence_at(p_, batch);
            const RangeMask mask = RangeMask::of(p_, seq, batch, 0);
            const int queries = queries_of_group(seq);
            for (int query = 0; queries > 0 && query < seq.seqlen_q; query += queries)
                add_group(batch, seq, mask, query, min(queries, seq.seqlen_q - query));
            if (queries == 0) add_query_tiles(batch, seq, mask);
        }
        longest_first(tiles_);
        longest_first(chunks_);
        join_heads(num_threads);
        running_ = std::make_unique<std::atomic<int>[]>(groups_.size() * p_.num_heads_k);
        for (size_t i = 0; i < groups_.size() * p_.num_heads_k; ++i)
            running_[i].store(groups_[i / p_.num_heads_k].num_chunks, std::memory_order_relaxed);
    }

    size_t partial_bytes() const { return size_t(partial_bytes_); }
    int64_t num_tasks() const { return num_tile_tasks() + int64_t(chunks_.size()) * num_parts(); }

    // partials: memory of partial_bytes().
    void run(int64_t i, char* partials, void* scratch) const {
        if (i < num_tile_tasks()) {
            FwdTask task = tiles_[i / p_.num_heads].task;
            task.first_head = int(i % p_.num_heads);
            return k_.fwd(params_, task, scratch);
        }
        i -= num_tile_tasks();
        run_chunk(chunks_[i / num_parts()], int(i % num_parts()) * heads_per_task_, partials, scratch);
    }

private:
    // A tile of queries of all heads of a key head. Its keys are split into chunks.
    struct Group {
        int num_chunks;
        int64_t bytes, first_byte;  // of one partial result; of the partial results of the first key head
    };
    // A tile for every head, or a chunk for every key head.
    struct Item {
        FwdTask task;
        int64_t cost;  // number of (row, key) pairs
        int group, chunk;
    };

    int group_size() const { return p_.num_heads / p_.num_heads_k; }
    int num_parts() const { return ceil_div(p_.num_heads_k, heads_per_task_); }
    int64_t num_tile_tasks() const { return int64_t(tiles_.size()) * p_.num_heads; }

    // Queries of a tile that has them for all heads of a key head: worth it where a tile of one head would have room
    // left. 0: tiles of one head; dropout blocks are of one head, too.
    int queries_of_group(const Sequence& seq) const {
        const bool is_short = seq.seqlen_q <= kQueryTile / 2 || int64_t(seq.seqlen_q) * group_size() <= kQueryTile;
        return p_.dropout.threshold || !is_short ? 0 : kQueryTile / group_size();
    }

    void add_query_tiles(int batch, const Sequence& seq, const RangeMask& mask) {
        for (int query = 0; query < seq.seqlen_q; query += kQueryTile) {
            const int count = min(kQueryTile, seq.seqlen_q - query);
            const Range keys = mask.kv_range({query, query + count});
            tiles_.push_back({{batch, 0, 1, query, count, keys.begin, keys.end, false, 1, nullptr, 0},
                              int64_t(count) * max(keys.end - keys.begin, 0),
                              0,
                              0});
        }
    }

    void add_group(int batch, const Sequence& seq, const RangeMask& mask, int query, int count) {
        const int heads = group_size(), rows = count * heads;
        // The last tile of many may have few rows, too.
        const bool decodes = has_few_rows(p_, seq) || (params_.inference && rows <= kDecodeRows);
        const Range keys = mask.kv_range({query, query + count});
        const int first = round_down(max(keys.begin, 0), kSplitAlignment);
        const int size = keys_per_chunk(max(keys.end - first, 0), rows, params_.num_splits);
        const int num_chunks = max(ceil_div(keys.end - first, size), 1);
        for (int chunk = 0; chunk < num_chunks; ++chunk) {
            const Range part{max(first + chunk * size, keys.begin), min(first + (chunk + 1) * size, keys.end)};
            chunks_.push_back({{batch, 0, heads, query, count, part.begin, part.end, decodes, 1, nullptr, 0},
                               int64_t(rows) * max(part.end - part.begin, 0),
                               int(groups_.size()),
                               chunk});
        }
        const int64_t bytes = num_chunks > 1 ? int64_t(k_.partial_bytes(params_, rows)) : 0;
        groups_.push_back({num_chunks, bytes, partial_bytes_});
        partial_bytes_ += bytes * num_chunks * p_.num_heads_k;
    }

    // Where the heads of a key lie next to each other, one task takes several of them, so that memory is read in order,
    // as long as there are tasks enough to keep all threads busy.
    void join_heads(int num_threads) {
        constexpr int kTasksPerThread = 4;
        if (std::abs(p_.k.head_stride) > std::abs(p_.k.row_stride)) return;
        int rows = 1;  // of the largest tile
        for (const Item& item : chunks_) rows = max(rows, item.task.num_queries * item.task.heads);
        const int64_t tasks = int64_t(chunks_.size()) * p_.num_heads_k;
        const int most = min(min(kDecodeTiles, p_.num_heads_k), max(kDecodeTaskRows / rows, 1));
        heads_per_task_ = int(clamp<int64_t>(tasks / (kTasksPerThread * int64_t(num_threads)), 1, most));
    }

    // The last chunk of a tile to finish merges them all, in order.
    void run_chunk(const Item& item, int head_k, char* partials, void* scratch) const {
        const Group& group = groups_[item.group];
        FwdTask task = item.task;
        task.first_head = head_k * group_size();
        task.num_tiles = min(heads_per_task_, p_.num_heads_k - head_k);
        if (group.num_chunks == 1) return k_.fwd(params_, task, scratch);
        task.partial_stride = group.num_chunks * group.bytes;
        char* const first = partials + group.first_byte + head_k * task.partial_stride;
        task.partial = first + item.chunk * group.bytes;
        k_.fwd(params_, task, scratch);
        std::atomic<int>* const running = running_.get() + int64_t(item.group) * p_.num_heads_k + head_k;
        for (int i = 0; i < task.num_tiles; ++i)
            if (running[i].fetch_sub(1, std::memory_order_acq_rel) == 1)
                k_.merge(params_, {tile_of(task, i), group.num_chunks, first + i * task.partial_stride});
    }

    const FwdParams& params_;
    const Problem& p_;
    const Kernels& k_;
    std::vector<Item> tiles_, chunks_;
    std::vector<Group> groups_;
    int64_t partial_bytes_ = 0;
    int heads_per_task_ = 1;                       // key heads
    std::unique_ptr<std::atomic<int>[]> running_;  // [group][key head]: chunks that have not finished
};

}  // namespace flash_attn::cpu
