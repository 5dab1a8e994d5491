#include "runner/compare_attention.h"
#include <algorithm>
#include <cmath>
#include "runner/elements.h"

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

double eps_of_results(const Case& c) { return c.float_results ? kFloatEps : eps_of(c.type); }

bool is_rounded(const Case& c, double x) { return double(round_to(c.type, float(x))) == double(float(x)); }

// Results in fp32 must not be numbers of the element type, unless nearly all of the reference are.
void check_unrounded(const char* name, const Case& c, const Compact& got, const Compact& exact, Report& report) {
    constexpr double kNoise = 1e-5;
    size_t expected = 0, found = 0;
    for (size_t at = 0; at < got.x.size(); ++at) {
        expected += std::abs(exact.x[at]) > kNoise && !is_rounded(c, exact.x[at]);
        found += !is_rounded(c, got.x[at]);
    }
    if (c.float_results && found < expected / 2)
        report.fail(format("%s: %zu of %zu are no 16-bit numbers; expected %zu", name, found, got.x.size(), expected));
}

void compare_dsoftmax_sum(const Inputs& x, const Forward& forward, const Compact& got, Report& report) {
    const Case& c = x.c;
    Compact expected = forward.softmax_lse, slack = got;
    for (size_t row = 0; row < expected.x.size(); ++row) {
        double sum = 0, size = 0;
        for (int d = 0; d < c.head_dim_v; ++d) {
            const size_t at = row * size_t(c.head_dim_v) + size_t(d);
            const double product = round_to(c.type, float(forward.out.x[at])) * x.values.dout.x[at];
            sum += product;
            size += std::abs(product);
        }
        const double dlse = c.lse_grad ? x.values.dlse.x[row] : 0;
        // 0 in rows that see no key, for every dlse: softmax_lse has no derivative there.
        const bool sees_any = std::isfinite(forward.softmax_lse.x[row]);
        expected.x[row] = sees_any ? sum - dlse : 0;
        slack.x[row] = expected.x[row] + (sees_any ? 2 * kFloatEps * (size + std::abs(dlse)) : 0);
    }
    compare("dsoftmax_sum", got, expected, {&slack}, {kFloatEps}, report);
}

}  // namespace

void compare_forward(const Case& c, const Forward& got, const Yardstick& y, Report& report) {
    if (!is_finite(y.exact.out)) report.fail("the reference of out is not finite");
    compare("out", got.out, y.exact.out, parts(y.plain, &Attention::out), {eps_of_results(c)}, report);
    check_unrounded("out", c, got.out, y.exact.out, report);
    compare("softmax_lse", got.softmax_lse, y.exact.softmax_lse, parts(y.plain, &Attention::softmax_lse), {kFloatEps},
            report);
    if (c.max_logits)
        compare("max_logits", got.max_logits, y.exact.max_logits, parts(y.plain, &Attention::max_logits), {kFloatEps},
                report);
}

void compare_backward(const Inputs& x, const Forward& forward, const Backward& got, const Yardstick& y,
                      Report& report) {
    const Case& c = x.c;
    // What cancels has been rounded to the element type, whatever the type of results.
    const double eps = eps_of_results(c), in_eps = eps_of(c.type) / eps;
    const double size_dq = cancelling_size(c, x.values, y.exact.out, x.values.k) * in_eps;
    const double size_dk = cancelling_size(c, x.values, y.exact.out, x.values.q) * in_eps;
    if (!is_finite(y.exact.dq) || !is_finite(y.exact.dk) || !is_finite(y.exact.dv))
        report.fail("the reference of gradients is not finite");
    compare("dq", got.dq, y.exact.dq, parts(y.plain, &Attention::dq), {eps, 3, size_dq}, report);
    compare("dk", got.dk, y.exact.dk, parts(y.plain, &Attention::dk), {eps, 3, size_dk}, report);
    compare("dv", got.dv, y.exact.dv, parts(y.plain, &Attention::dv), {eps, 3}, report);
    compare_dsoftmax_sum(x, forward, got.dsoftmax_sum, report);
    check_unrounded("dq", c, got.dq, y.exact.dq, report);
    check_unrounded("dk", c, got.dk, y.exact.dk, report);
    check_unrounded("dv", c, got.dv, y.exact.dv, report);
}

}  // namespace flash_attn::runner
