// Results of a case against its reference, under every schedule.
#include <algorithm>
#include <cmath>
#include "runner/check.h"
#include "runner/elements.h"
#include "runner/io.h"
#include "runner/reference.h"
#include "runner/run.h"

namespace flash_attn::runner {
namespace {

std::vector<const Compact*> parts(const std::vector<Attention>& all, Compact Attention::* part) {
    std::vector<const Compact*> found;
    for (const Attention& a : all) found.push_back(&(a.*part));
    return found;
}

bool is_finite(const Compact& t) {
    return std::all_of(t.x.begin(), t.x.end(), [](double x) { return std::isfinite(x); });
}

double largest_size(const Compact& t) {
    double largest = 0;
    for (const double x : t.x) largest = std::max(largest, std::abs(x));
    return largest;
}

// How large what cancels is in gradients of scores, times `other` (k for dq, q for dk): see cancelling_size in
// tests/check.py. A query that sees a single key has gradients of zero. Plain attention subtracts a number from itself,
// and kernels subtract rowsum(dout * out), which dropout has rescaled and rounded.
//
// Of large scores every weight is off by a rounding error of its score: also that of a query with one key that counts,
// which plain attention makes exactly 1.
double cancelling_size(const Case& c, const Values& values, const Compact& out, const Compact& other) {
    const bool large = c.check == "large";
    if (c.dropout_p == 0 && !large) return 0;
    double all = 0, largest = 0;
    for (const Sequence& s : sequences(c))
        for (int i = 0; i < s.seqlen_q; ++i) {
            int seen = 0;
            for (int j = 0; j < s.seqlen_k; ++j) seen += visible(c, s, i, j);
            if (seen != 1 && !large) continue;
            for (int h = 0; h < c.num_heads; ++h) {
                double squares = 0;
                for (int d = 0; d < c.head_dim_v; ++d)
                    squares += std::pow(values.dout.at(s.compact_q + i, h)[d] * out.at(s.compact_q + i, h)[d], 2);
                all += squares;
                largest = std::max(largest, squares);
            }
        }
    return c.scale() * std::sqrt(large ? largest : all) * largest_size(other);
}

void compare_forward(const Case& c, const Forward& got, const Yardstick& y, Report& report) {
    if (!is_finite(y.exact.out)) report.fail("the reference of out is not finite");
    compare("out", got.out, y.exact.out, parts(y.plain, &Attention::out), {eps_of(c.type)}, report);
    compare("softmax_lse", got.softmax_lse, y.exact.softmax_lse, parts(y.plain, &Attention::softmax_lse), {kFloatEps},
            report);
}

void compare_dsoftmax_sum(const Inputs& x, const Forward& forward, const Compact& got, Report& report) {
    const Case& c = x.c;
    Compact expected = forward.softmax_lse, slack = got;
    for (size_t row = 0; row < expected.x.size(); ++row) {
        double sum = 0, size = 0;
        for (int d = 0; d < c.head_dim_v; ++d) {
            const size_t at = row * size_t(c.head_dim_v) + size_t(d);
            sum += forward.out.x[at] * x.values.dout.x[at];
            size += std::abs(forward.out.x[at] * x.values.dout.x[at]);
        }
        const double dlse = c.lse_grad ? x.values.dlse.x[row] : 0;
        // 0 in rows that see no key, for every dlse: softmax_lse has no derivative there.
        const bool sees_any = std::isfinite(forward.softmax_lse.x[row]);
        expected.x[row] = sees_any ? sum - dlse : 0;
        slack.x[row] = expected.x[row] + (sees_any ? 2 * kFloatEps * (size + std::abs(dlse)) : 0);
    }
    compare("dsoftmax_sum", got, expected, {&slack}, {kFloatEps}, report);
}

void compare_backward(const Inputs& x, const Forward& forward, const Backward& got, const Yardstick& y,
                      Report& report) {
    const Case& c = x.c;
    const double eps = eps_of(c.type);
    const double size_dq = cancelling_size(c, x.values, y.exact.out, x.values.k);
    const double size_dk = cancelling_size(c, x.values, y.exact.out, x.values.q);
    if (!is_finite(y.exact.dq) || !is_finite(y.exact.dk) || !is_finite(y.exact.dv))
        report.fail("the reference of gradients is not finite");
    compare("dq", got.dq, y.exact.dq, parts(y.plain, &Attention::dq), {eps, 3, size_dq}, report);
    compare("dk", got.dk, y.exact.dk, parts(y.plain, &Attention::dk), {eps, 3, size_dk}, report);
    compare("dv", got.dv, y.exact.dv, parts(y.plain, &Attention::dv), {eps, 3}, report);
    compare_dsoftmax_sum(x, forward, got.dsoftmax_sum, report);
}

// Sizes of the weights against the reference; signs against the random numbers; zeros outside of sequences.
void compare_probs(const Inputs& x, const Forward& forward, const std::vector<float>& got, Report& report) {
    const Case& c = x.c;
    Compact sizes(int(got.size()), 1, 1), expected = sizes, slack = sizes;
    int wrong_signs = 0;
    for (size_t at = 0; at < got.size(); ++at) sizes.x[at] = std::fabs(got[at]);
    for (const Sequence& s : sequences(c))
        for (int h = 0; h < c.num_heads; ++h) {
            const std::vector<double> probs = attn_probs(c, x.values, s, h);
            for (int i = 0; i < s.seqlen_q; ++i)
                for (int j = 0; j < s.seqlen_k; ++j) {
                    const int64_t row = (int64_t(s.index) * c.num_heads + h) * c.seqlen_q() + i;
                    const size_t at = size_t(row * c.seqlen_k() + j);
                    const double p = probs[size_t(i) * size_t(s.seqlen_k) + size_t(j)];
                    expected.x[at] = p;
                    // The log-sum-exp of other kernels is of scores that were summed up in another order.
                    const double score =
                        p > 0 && forward.hopper ? std::log(p) + *forward.softmax_lse.at(s.compact_q + i, h) : 0;
                    slack.x[at] = p + kFloatEps * p * (64 + 8 * std::abs(score));
                    const bool drops = c.dropout_p > 0 && visible(c, s, i, j) && dropped(c, x.values, s.index, h, i, j);
                    wrong_signs += drops != std::signbit(got[at]);
                }
        }
    compare("attn_probs", sizes, expected, {&slack}, {eps_of(c.type)}, report);
    if (wrong_signs) report.fail(format("attn_probs: %d weights have the wrong sign", wrong_signs));
}

std::string named(const char* name, Schedule schedule) {
    static const char* const kLandings[] = {"early", "late", "random"};
    return format("%s again, --seed %u --landing %s", name, schedule.seed, kLandings[int(schedule.landing)]);
}

void compare_traffic(const char* pass, const Traffic& got, const Traffic& expected, Report& report) {
    const std::string text = format("%s: %lld bytes read, %lld written, %lld added", pass, (long long)(got.read),
                                    (long long)(got.written), (long long)(got.added));
    if (got == expected) return report.note(text);
    report.fail(text + format("; expected %lld, %lld, %lld", (long long)(expected.read), (long long)(expected.written),
                              (long long)(expected.added)));
}

}  // namespace

void check_reference(const Case& c, const Plan& plan, Report& report) {
    const Inputs x(c);
    const bool backward = plan.backward && c.has_backward();
    const Yardstick y = make_yardstick(c, x.values, backward);
    Forward first;
    Backward first_backward;
    for (size_t run = 0; run < plan.schedules.size(); ++run) {
        const Schedule schedule = plan.schedules[run];
        const Forward forward = run_forward(x, schedule, report);
        if (run == 0) {
            first = forward;
            compare_forward(c, forward, y, report);
            compare_traffic("forward", forward.traffic, forward_traffic(x, forward.hopper), report);
        }
        compare_bitwise(named("out", schedule), forward.out, first.out, report);
        compare_bitwise(named("softmax_lse", schedule), forward.softmax_lse, first.softmax_lse, report);
        if (backward) {
            const Backward gradients = run_backward(x, first.out, first.softmax_lse, schedule, report);
            if (run == 0) {
                first_backward = gradients;
                compare_traffic("backward", gradients.traffic, backward_traffic(x, gradients.hopper), report);
            }
            if (run == 0 || !c.deterministic) compare_backward(x, first, gradients, y, report);
            if (c.deterministic) compare_bitwise(named("dq", schedule), gradients.dq, first_backward.dq, report);
            compare_bitwise(named("dk", schedule), gradients.dk, first_backward.dk, report);
            compare_bitwise(named("dv", schedule), gradients.dv, first_backward.dv, report);
        }
        if (plan.attn_probs && run == 0) {
            const Probs probs = run_attn_probs(x, first.softmax_lse, schedule, report);
            compare_probs(x, first, probs.weights, report);
            compare_traffic("attn_probs", probs.traffic, probs_traffic(x), report);
        }
    }
}

}  // namespace flash_attn::runner
