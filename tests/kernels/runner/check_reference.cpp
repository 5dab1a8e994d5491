// Results of a case against its reference, under every schedule.
#include <cmath>
#include "runner/check.h"
#include "runner/compare_attention.h"
#include "runner/elements.h"
#include "runner/io.h"
#include "runner/reference.h"
#include "runner/run.h"

namespace flash_attn::runner {
namespace {

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
                    const bool drops = c.dropout_p > 0 && visible(c, s, i, j) && dropped(c, x.values, s, h, i, j);
                    wrong_signs += drops != std::signbit(got[at]);
                }
        }
    constexpr double kLeastNormal = 0x1p-14;  // of fp16: where a sink outweighs all keys, weights are below
    compare("attn_probs", sizes, expected, {&slack}, {eps_of(c.type), 2, kLeastNormal}, report);
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
        compare_bitwise(named("max_logits", schedule), forward.max_logits, first.max_logits, report);
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
