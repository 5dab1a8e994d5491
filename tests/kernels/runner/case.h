// One attention problem and what is to be checked of it, written as a line of key=value: see list_cases.py.
#pragma once
#include <cstdint>
#include <string>
#include <vector>
#include "problem.h"

namespace flash_attn::runner {

enum class Layout { kRows, kHeads, kGaps, kChunks, kFar };

struct Case {
    std::vector<int> seqlens_q, seqlens_k;
    ElementType type = ElementType::kBFloat16;
    int num_heads = 2, num_heads_k = 2, head_dim = 64, head_dim_v = 64;
    bool packed = false, causal = false;
    int window_left = -1, window_right = -1;  // -1: unbounded
    int attention_chunk = 0;
    double softcap = 0, softmax_scale = 0;  // a scale of 0 stands for head_dim^-0.5
    std::string alibi;                      // "heads", "batch" or none
    double dropout_p = 0;
    std::vector<int> seqused_k, leftpad_k;  // one number per sequence, or none at all
    int seqlen_new = 0;                     // rows of a KV cache that seqused_k does not count
    int page_size = 0, unused_rows = 0;
    std::vector<int> q_starts, k_starts;  // one position per sequence in a longer one, or none at all
    int head_start = 0, total_heads = 0;  // of a shard of heads: the first one, and how many there are elsewhere too
    bool float_results = false;           // out, dq, dk and dv in fp32
    bool lse_grad = false;
    bool max_logits = false;
    std::string s_aux;  // "all" heads have sinks, or "some", all but the first, or none
    std::string
        key_ranges;  // "prefix", "documents", "shuffled", "random", "hostile", "shared" by all sequences, or none
    int seqlen_q_if_empty = 0, seqlen_k_if_empty = 0;
    int seed = 0;

    std::string check = "reference";
    Layout layout = Layout::kRows;
    int smem = 232448, compute_capability = 80, multiprocessors = 3;
    bool deterministic = false;

    int batch_size() const { return int(seqlens_q.size()); }
    int seqlen_q() const;  // the longest
    int seqlen_k() const;
    double scale() const;
    uint32_t dropout_threshold() const;  // of 65536
    bool paged() const { return page_size > 0; }
    bool shares_ranges() const { return key_ranges == "shared" && !packed; }
    bool placed() const { return !q_starts.empty() || !k_starts.empty(); }
    bool has_backward() const { return !paged() && seqlen_new == 0; }
};

// Stops the program with a message if the line is not understood.
Case parse_case(const std::string& line);

// Where one sequence is: first rows within its batch entry or within the packed tensor, and within the rows of all
// sequences put end to end, which is how the reference has them.
struct Sequence {
    int index, batch;  // batch is 0 in packed tensors
    int first_q, seqlen_q, first_k, seqlen_k;
    int compact_q, compact_k;
    int q_start, k_start;  // positions in the longer sequence that the case tells of; otherwise 0

    // Distance from key j to query i, on one axis; positive if the key comes first.
    int distance(const Case& c, int i, int j) const {
        return (c.placed() ? q_start - k_start : seqlen_k - seqlen_q) + i - j;
    }
};
std::vector<Sequence> sequences(const Case& c);

// Rows of q and of k in all sequences together.
int total_rows_q(const Case& c);
int total_rows_k(const Case& c);

// Whether query i sees key j, by the definition in problem.h; and without key ranges.
bool visible(const Case& c, const Sequence& s, int i, int j);
bool visible_in_window(const Case& c, const Sequence& s, int i, int j);

// The range of query i as the kernels get it: it may be empty, reversed or out of bounds. Without ranges, unbounded.
struct KeyRange { int begin, end; };
KeyRange key_range(const Case& c, const Sequence& s, int i);

}  // namespace flash_attn::runner
