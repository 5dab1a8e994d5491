// The tensors that kernels are given for a case, and the same numbers as the reference wants them.
#pragma once
#include <vector>
#include "problem.h"
#include "runner/case.h"
#include "runner/tensors.h"

namespace flash_attn::runner {

// Rows of all sequences put end to end: [rows, heads, head_dim]. No rows but those in use.
struct Compact {
    int heads = 0, head_dim = 0;
    std::vector<double> x;

    Compact() = default;
    Compact(int rows, int heads, int head_dim)
        : heads(heads), head_dim(head_dim), x(size_t(rows) * size_t(heads) * size_t(head_dim), 0) {}
    double* at(int row, int head) { return x.data() + (int64_t(row) * heads + head) * head_dim; }
    const double* at(int row, int head) const { return x.data() + (int64_t(row) * heads + head) * head_dim; }
};

// What the tensors hold, rounded to their type.
struct Values {
    Compact q, k, v, dout;
    Compact dlse;               // [rows, heads, 1]
    std::vector<float> slopes;  // [batch_size, num_heads], empty without ALiBi
    std::vector<float> sinks;   // [num_heads], empty without sinks
    uint64_t seed = 0, offset = 0;
};

struct Inputs {
    explicit Inputs(const Case& c);
    Inputs(const Case& c, Values values);

    Problem problem() const;
    // The places of row i of q and of row j of k in tensors laid out as q and k are.
    static uint16_t& q_element(const Tensor& t, const Sequence& s, int i, int head, int d) {
        return t.at(s.batch, s.first_q + i, head, d);
    }
    uint16_t& k_element(const Tensor& t, const Sequence& s, int j, int head, int d) const;

    Case c;
    Values values;
    Tensor q, k, v, dout;
    RowTensor dlse;
    std::vector<int32_t> pages;  // block_table as it was made: [batch_size, max_pages]
    int max_pages = 0, num_pages = 0;
    Numbers<int32_t> cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, q_starts, k_starts, key_ranges;
    Numbers<float> alibi_slopes, sinks;
    Numbers<int64_t> rng_state;

private:
    Positions positions() const;
    void make_pages();
    void make_metadata();
    void make_key_ranges();
    void write_values();
};

// Random numbers of the case's seed, rounded to its type.
Values make_values(const Case& c);

// Rows of q, out, dout and dq, or of k, v, dk and dv, as the case lays them out. Pages are batch entries.
Shape shape_q(const Case& c, int head_dim);
Shape shape_k(const Case& c, int head_dim);

}  // namespace flash_attn::runner
