// Checks that compare runs of kernels with each other, or only that a run ends without a report.
#include <algorithm>
#include <cmath>
#include <limits>
#include "runner/check.h"
#include "runner/run.h"

namespace flash_attn::runner {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Compact slice(const Compact& t, int first, int count) {
    Compact part(count, t.heads, t.head_dim);
    std::copy_n(t.at(first, 0), part.x.size(), part.x.begin());
    return part;
}

// The first `count` queries of every sequence of a dense batch.
Compact first_rows(const Case& c, const Compact& t, int count) {
    Compact part(count * c.batch_size(), t.heads, t.head_dim);
    for (const Sequence& s : sequences(c))
        std::copy_n(t.at(s.compact_q, 0), int64_t(count) * t.heads * t.head_dim, part.at(s.index * count, 0));
    return part;
}

// One sequence of a case as a dense batch of its own.
Case alone(Case c, const Sequence& s) {
    c.seqlens_q = {s.seqlen_q}, c.seqlens_k = {s.seqlen_k};
    c.seqused_k.clear(), c.leftpad_k.clear();
    if (!c.q_starts.empty()) c.q_starts = {s.q_start};
    if (!c.k_starts.empty()) c.k_starts = {s.k_start};
    c.packed = false, c.unused_rows = 0, c.page_size = 0;
    return c;
}

Values values_of(const Case& c, const Values& all, const Sequence& s) {
    Values x;
    x.q = slice(all.q, s.compact_q, s.seqlen_q);
    x.k = slice(all.k, s.compact_k, s.seqlen_k);
    x.v = slice(all.v, s.compact_k, s.seqlen_k);
    x.dout = slice(all.dout, s.compact_q, s.seqlen_q);
    x.dlse = slice(all.dlse, s.compact_q, s.seqlen_q);
    if (!all.slopes.empty())
        x.slopes.assign(all.slopes.begin() + s.index * c.num_heads, all.slopes.begin() + (s.index + 1) * c.num_heads);
    x.sinks = all.sinks;
    x.seed = all.seed, x.offset = all.offset;
    return x;
}

// Invalid values for one length or table entry, `variant` choosing among them.
constexpr int kInvalidVariants = 6;
int32_t invalid_value(int variant, int32_t right) {
    constexpr int32_t kLargest = std::numeric_limits<int32_t>::max(), kSmallest = std::numeric_limits<int32_t>::min();
    const int32_t values[kInvalidVariants] = {-1, kLargest, kSmallest, right + 1, right - 50, right + 1000};
    return values[variant];
}

// Overwrites every `step`th number, from `first` on.
void corrupt(const Numbers<int32_t>& numbers, int count, int first, int step, int variant) {
    for (int i = first; numbers.data() && i < count; i += step)
        numbers.data()[i] = invalid_value(variant, numbers.data()[i]);
}

}  // namespace

void check_batch(const Case& c, const Plan& plan, Report& report) {
    const Inputs x(c);
    const Forward together = run_forward(x, plan.schedules[0], report);
    for (const Sequence& s : sequences(c)) {
        const Inputs own(alone(c, s), values_of(c, x.values, s));
        const Forward forward = run_forward(own, plan.schedules[0], report);
        const std::string name = format(" of sequence %d, alone and among others", s.index);
        compare_bitwise("out" + name, forward.out, slice(together.out, s.compact_q, s.seqlen_q), report);
        compare_bitwise("softmax_lse" + name, forward.softmax_lse, slice(together.softmax_lse, s.compact_q, s.seqlen_q),
                        report);
        if (c.max_logits)
            compare_bitwise("max_logits" + name, forward.max_logits, slice(together.max_logits, s.index, 1), report);
    }
}

void check_invalid_lengths(const Case& c, const Plan& plan, Report& report) {
    const Inputs clean(c);
    const Forward forward = run_forward(clean, plan.schedules[0], report);
    const int batch_size = c.batch_size();
    for (int variant = 0; variant < kInvalidVariants; ++variant)
        for (int target = 0; target < 8; ++target) {
            if (target == 4 && !c.paged()) continue;
            if (target == 7 && !c.placed()) continue;
            if (target == 6 && variant > 0) continue;
            Values values = clean.values;
            if (target == 6) std::fill(values.v.x.begin(), values.v.x.end(), NAN);
            const Inputs x(c, values);
            Report any_answer;
            if (target == 0) corrupt(x.cu_seqlens_q, batch_size + 1, 1, 2, variant);
            if (target == 1) corrupt(x.cu_seqlens_k, batch_size + 1, 0, 2, variant);
            if (target == 2) corrupt(x.seqused_k, batch_size, 0, 2, variant);
            if (target == 3) corrupt(x.leftpad_k, batch_size, 1, 2, variant);
            if (target == 4) corrupt(x.block_table, batch_size * x.max_pages, 0, 3, variant);
            if (target == 5) {
                corrupt(x.cu_seqlens_q, batch_size + 1, 0, 1, variant);
                corrupt(x.cu_seqlens_k, batch_size + 1, 1, 1, variant);
            }
            if (target == 6) {  // every other sequence starts at 0 again: several share tiles, semaphores and lists
                corrupt(x.cu_seqlens_q, batch_size + 1, 1, 2, 1);
                corrupt(x.cu_seqlens_q, batch_size + 1, 2, 2, 2);
            }
            if (target == 7) {
                corrupt(x.q_starts, batch_size, 0, 2, variant);
                corrupt(x.k_starts, batch_size, 1, 2, variant);
            }
            run_forward(x, plan.schedules[0], any_answer);
            run_attn_probs(x, forward.softmax_lse, plan.schedules[0], any_answer);
            if (c.has_backward()) run_backward(x, forward.out, forward.softmax_lse, plan.schedules[0], any_answer);
        }
}

void check_marked(const Case& c, const Plan& plan, Report& report) {
    if (!plan.backward) return;
    const Schedule schedule = plan.schedules[0];
    const Inputs x(c);
    const Forward forward = run_forward(x, schedule, report);
    if (c.causal) {
        // Queries that see no key: either infinity is right, for all gradients that come to them.
        const Backward expected = run_backward(x, forward.out, forward.softmax_lse, schedule, report);
        Values values = x.values;
        Compact softmax_lse = forward.softmax_lse;
        for (size_t row = 0; row < softmax_lse.x.size(); ++row) {
            if (std::isfinite(softmax_lse.x[row])) continue;
            softmax_lse.x[row] = kInfinity;
            values.dlse.x[row] = NAN;
            std::fill_n(values.dout.x.begin() + int64_t(row) * c.head_dim_v, c.head_dim_v, NAN);
        }
        const Backward got = run_backward(Inputs(c, values), forward.out, softmax_lse, schedule, report);
        compare_bitwise("dq beside NaN at queries without keys", got.dq, expected.dq, report);
        compare_bitwise("dk beside NaN at queries without keys", got.dk, expected.dk, report);
        compare_bitwise("dv beside NaN at queries without keys", got.dv, expected.dv, report);
        compare_bitwise("dsoftmax_sum beside NaN at queries without keys", got.dsoftmax_sum, expected.dsoftmax_sum,
                        report);
        return;
    }
    constexpr int kMarkedFrom = 40;
    Case few = c;
    for (int& n : few.seqlens_q) n = kMarkedFrom;
    Values values = x.values;
    for (Compact* t : {&values.q, &values.dout, &values.dlse}) *t = first_rows(c, *t, kMarkedFrom);
    const Backward expected = run_backward(Inputs(few, values), first_rows(c, forward.out, kMarkedFrom),
                                           first_rows(c, forward.softmax_lse, kMarkedFrom), schedule, report);
    for (const double infinity : {kInfinity, -kInfinity}) {
        Compact softmax_lse = forward.softmax_lse, dq = Compact(total_rows_q(c), c.num_heads, c.head_dim);
        for (const Sequence& s : sequences(c))
            for (int i = 0; i < s.seqlen_q; ++i)
                for (int h = 0; h < c.num_heads; ++h)
                    if (i < kMarkedFrom)
                        std::copy_n(expected.dq.at(s.index * kMarkedFrom + i, h), c.head_dim,
                                    dq.at(s.compact_q + i, h));
                    else
                        *softmax_lse.at(s.compact_q + i, h) = infinity;
        const Backward got = run_backward(x, forward.out, softmax_lse, schedule, report);
        compare_bitwise("dq with rows marked", got.dq, dq, report);
        compare_bitwise("dk with rows marked", got.dk, expected.dk, report);
        compare_bitwise("dv with rows marked", got.dv, expected.dv, report);
    }
}

}  // namespace flash_attn::runner
