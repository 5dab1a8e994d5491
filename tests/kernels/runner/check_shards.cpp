// A case in shards: each of them knows its place, and what they give together is the attention of the whole.
#include <algorithm>
#include <cmath>
#include "runner/check.h"
#include "runner/compare_attention.h"

namespace flash_attn::runner {
namespace {

constexpr int kShards = 2;  // of the queries, and of the keys, of every sequence

// Rows of each sequence in one of the shards. Blocks of random numbers do not straddle them.
struct Part { int first, count; };
Part part_of(int rows, int shard) {
    const int split = rows / 2 / 32 * 32;
    return shard ? Part{split, rows - split} : Part{0, split};
}

// Copies the rows of a shard out of those of the whole, or adds them to the whole.
template <class F> void for_each_row(const Case& c, bool of_queries, int shard, F f) {
    int row = 0;
    for (const Sequence& s : sequences(c)) {
        const Part part = part_of(of_queries ? s.seqlen_q : s.seqlen_k, shard);
        for (int i = 0; i < part.count; ++i) f((of_queries ? s.compact_q : s.compact_k) + part.first + i, row++);
    }
}
Compact rows_of_shard(const Case& c, const Compact& whole, bool of_queries, int shard) {
    int count = 0;
    for_each_row(c, of_queries, shard, [&](int, int) { ++count; });
    Compact rows(count, whole.heads, whole.head_dim);
    for_each_row(c, of_queries, shard, [&](int from, int to) {
        std::copy_n(whole.at(from, 0), whole.heads * whole.head_dim, rows.at(to, 0));
    });
    return rows;
}
void add_rows(const Case& c, Compact& whole, const Compact& rows, bool of_queries, int shard) {
    for_each_row(c, of_queries, shard, [&](int to, int from) {
        for (int i = 0; i < whole.heads * whole.head_dim; ++i) whole.at(to, 0)[i] += rows.at(from, 0)[i];
    });
}

Inputs shard_of(const Case& c, const Values& all, int shard_q, int shard_k) {
    Case part = c;
    part.q_starts.clear(), part.k_starts.clear();
    for (const Sequence& s : sequences(c)) {
        const Part q = part_of(s.seqlen_q, shard_q), k = part_of(s.seqlen_k, shard_k);
        part.seqlens_q[size_t(s.index)] = q.count, part.seqlens_k[size_t(s.index)] = k.count;
        part.q_starts.push_back(s.q_start + q.first), part.k_starts.push_back(s.k_start + k.first);
    }
    Values values = all;
    for (Compact* t : {&values.q, &values.dout, &values.dlse}) *t = rows_of_shard(c, *t, true, shard_q);
    for (Compact* t : {&values.k, &values.v}) *t = rows_of_shard(c, *t, false, shard_k);
    return Inputs(part, values);
}

// Adds the attention to more keys to that of before, whose rows without any key have a softmax_lse of -infinity.
void merge(Forward& sum, const Forward& more) {
    const int dims = sum.out.head_dim;
    for (size_t row = 0; row < sum.softmax_lse.x.size(); ++row) {
        double &lse = sum.softmax_lse.x[row], other = more.softmax_lse.x[row], largest = std::max(lse, other);
        if (std::isinf(largest)) continue;
        const double merged = largest + std::log(std::exp(lse - largest) + std::exp(other - largest));
        for (int d = 0; d < dims; ++d) {
            double& x = sum.out.x[row * size_t(dims) + size_t(d)];
            x = x * std::exp(lse - merged) + more.out.x[row * size_t(dims) + size_t(d)] * std::exp(other - merged);
        }
        lse = merged;
    }
}

}  // namespace

void check_shards(const Case& c, const Plan& plan, Report& report) {
    const Inputs whole(c);
    const Yardstick y = make_yardstick(c, whole.values, plan.backward);
    const Schedule schedule = plan.schedules[0];
    Forward forward{
        Compact(total_rows_q(c), c.num_heads, c.head_dim_v), Compact(total_rows_q(c), c.num_heads, 1), {}, {}};
    Backward backward{Compact(total_rows_q(c), c.num_heads, c.head_dim),
                      Compact(total_rows_k(c), c.num_heads_k, c.head_dim),
                      Compact(total_rows_k(c), c.num_heads_k, c.head_dim_v),
                      Compact(total_rows_q(c), c.num_heads, 1),
                      {},
                      {}};
    for (int i = 0; i < kShards; ++i) {
        Forward merged = run_forward(shard_of(c, whole.values, i, 0), schedule, report);
        for (int j = 1; j < kShards; ++j) merge(merged, run_forward(shard_of(c, whole.values, i, j), schedule, report));
        add_rows(c, forward.out, merged.out, true, i);
        add_rows(c, forward.softmax_lse, merged.softmax_lse, true, i);
        for (int j = 0; plan.backward && j < kShards; ++j) {
            const Inputs shard = shard_of(c, whole.values, i, j);
            const Backward gradients = run_backward(shard, merged.out, merged.softmax_lse, schedule, report);
            add_rows(c, backward.dq, gradients.dq, true, i);
            add_rows(c, backward.dk, gradients.dk, false, j);
            add_rows(c, backward.dv, gradients.dv, false, j);
            if (j == 0) add_rows(c, backward.dsoftmax_sum, gradients.dsoftmax_sum, true, i);
        }
    }
    compare_forward(c, forward, y, report);
    if (plan.backward) compare_backward(whole, forward, backward, y, report);
}

}  // namespace flash_attn::runner
