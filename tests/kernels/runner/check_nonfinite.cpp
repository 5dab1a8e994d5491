// NaN and infinities: they reach what attends to them, and nothing else.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include "runner/check.h"
#include "runner/elements.h"
#include "runner/run.h"

namespace flash_attn::runner {
namespace {

struct Results { Compact out, softmax_lse, max_logits, dq, dk, dv; };

constexpr struct {
    const char* name;
    Compact Results::* part;
} kParts[] = {{"out", &Results::out},
              {"softmax_lse", &Results::softmax_lse},
              {"max_logits", &Results::max_logits},
              {"dq", &Results::dq},
              {"dk", &Results::dk},
              {"dv", &Results::dv}};

// What every query and key receives from those it attends to: no element that the mask hides is ever touched, so that
// NaN spreads by selection alone. One sequence, one head, plain scores.
class SelectingReference {
public:
    SelectingReference(const Case& c, const Values& values) : c_(c), x_(values), s_(sequences(c)[0]) {
        const int rows_q = s_.seqlen_q, rows_k = s_.seqlen_k;
        r_ = {Compact(rows_q, 1, c.head_dim_v), Compact(rows_q, 1, 1),          Compact(1, 1, 1),
              Compact(rows_q, 1, c.head_dim),   Compact(rows_k, 1, c.head_dim), Compact(rows_k, 1, c.head_dim_v)};
        r_.max_logits.x[0] = -std::numeric_limits<double>::infinity();
        for (int i = 0; i < rows_q; ++i) add_query(i);
    }
    const Results& results() const { return r_; }
    // Whether all scores of a query are -infinity, as if it saw no key. There is no right answer to that.
    bool is_open() const { return is_open_; }

private:
    static double dot(const double* a, const double* b, int length) {
        double sum = 0;
        for (int d = 0; d < length; ++d) sum += a[d] * b[d];
        return sum;
    }
    static void add(double* sum, double factor, const double* x, int length) {
        for (int d = 0; d < length; ++d) sum[d] += factor * x[d];
    }

    void add_query(int i) {
        std::vector<int> keys;
        std::vector<double> p, dp;
        double largest = -std::numeric_limits<double>::infinity(), sum = 0, product = 0;
        for (int j = 0; j < s_.seqlen_k; ++j) {
            if (!visible(c_, s_, i, j)) continue;
            keys.push_back(j);
            p.push_back(dot(x_.q.at(i, 0), x_.k.at(j, 0), c_.head_dim) * c_.scale());
            dp.push_back(dot(x_.dout.at(i, 0), x_.v.at(j, 0), c_.head_dim_v));
            if (p.back() > largest) largest = p.back();
            double& all = r_.max_logits.x[0];
            if (std::isnan(p.back()) || all < p.back()) all = p.back();
        }
        const double sink = x_.sinks.empty() ? -std::numeric_limits<double>::infinity() : double(x_.sinks[0]);
        is_open_ |= largest == -std::numeric_limits<double>::infinity() &&
                    std::all_of(p.begin(), p.end(), [](double s) { return !std::isnan(s); });
        largest = std::max(largest, sink);
        for (double& s : p) sum += s = std::exp(s - largest);
        if (!std::isinf(sink)) sum += std::exp(sink - largest);
        *r_.softmax_lse.at(i, 0) = largest + std::log(sum);
        for (size_t n = 0; n < keys.size(); ++n) product += (p[n] /= sum) * dp[n];
        const double dlse = c_.lse_grad ? *x_.dlse.at(i, 0) : 0;
        for (size_t n = 0; n < keys.size(); ++n) {
            const int j = keys[n];
            const double ds = p[n] * (dp[n] - product + dlse) * c_.scale();
            add(r_.out.at(i, 0), p[n], x_.v.at(j, 0), c_.head_dim_v);
            add(r_.dv.at(j, 0), p[n], x_.dout.at(i, 0), c_.head_dim_v);
            add(r_.dq.at(i, 0), ds, x_.k.at(j, 0), c_.head_dim);
            add(r_.dk.at(j, 0), ds, x_.q.at(i, 0), c_.head_dim);
        }
    }

    const Case& c_;
    const Values& x_;
    Sequence s_;
    Results r_;
    bool is_open_ = false;
};

// Gradients are empty if the plan leaves them out.
Results run(const Inputs& x, const Plan& plan, Report& report) {
    const Schedule schedule = plan.schedules[0];
    const Forward forward = run_forward(x, schedule, report);
    if (!plan.backward) return {forward.out, forward.softmax_lse, forward.max_logits, {}, {}, {}};
    const Backward backward = run_backward(x, forward.out, forward.softmax_lse, schedule, report);
    return {forward.out, forward.softmax_lse, forward.max_logits, backward.dq, backward.dk, backward.dv};
}

enum class Where { kQ, kK, kV, kDout, kDlse };
constexpr const char* kWhere[] = {"q", "k", "v", "dout", "dlse"};

// The bits of a NaN as arithmetic makes it, and those that are all ones, which arithmetic on bits turns into zero.
uint16_t nan_bits(const Case& c, bool all_ones) {
    return all_ones ? 0xffff : c.type == ElementType::kBFloat16 ? 0x7fc0 : 0x7e00;
}

// Puts a NaN or an infinity into a row of a tensor and of the values that the reference takes.
void put(Inputs& x, Where where, int row, bool infinite, bool all_ones) {
    const int element = 2 + row % 3 % 2;  // either half of a pair
    const Sequence s = sequences(x.c)[0];
    const double value = infinite ? std::numeric_limits<double>::infinity() : NAN;
    const uint16_t bits = infinite ? to_bits(x.c.type, float(value)) : nan_bits(x.c, all_ones);
    Values& v = x.values;
    if (where == Where::kDlse) {
        *v.dlse.at(row, 0) = value;
        const uint32_t ones = 0xffffffff;
        std::memcpy(&x.dlse.at(s.batch, 0, s.first_q + row), &ones, sizeof ones);
    } else if (where == Where::kQ || where == Where::kDout) {
        (where == Where::kQ ? v.q : v.dout).at(row, 0)[element] = value;
        Inputs::q_element(where == Where::kQ ? x.q : x.dout, s, row, 0, element) = bits;
    } else {
        (where == Where::kK ? v.k : v.v).at(row, 0)[element] = value;
        x.k_element(where == Where::kK ? x.k : x.v, s, row, 0, element) = bits;
    }
}

// Numbers near 1, as they come out of bfloat16.
bool is_near(double x, double expected) { return std::abs(x - expected) <= 0.03 + 0.03 * std::abs(expected); }

// Where the reference is finite, the bits of the clean run, unless scores are infinite: then weights of zero move other
// results, which are compared with the reference. Elsewhere a NaN. An infinity may become either: the reference
// multiplies it with sums of another kind.
void compare_selected(const std::string& context, Results got, const Results& expected, const Results& clean,
                      bool infinite, bool infinite_scores, Report& report) {
    for (const auto& [name, part] : kParts) {
        if ((got.*part).x.empty()) continue;
        Compact wanted = expected.*part;
        for (size_t at = 0; at < wanted.x.size(); ++at) {
            double& x = (got.*part).x[at];
            const bool finite = std::isfinite(wanted.x[at]);
            wanted.x[at] = finite ? (clean.*part).x[at] : NAN;
            if (infinite && std::isinf(x)) x = NAN;
            if (infinite_scores && finite && is_near(x, (expected.*part).x[at])) x = wanted.x[at];
        }
        compare_bitwise(name + context, got.*part, wanted, report);
    }
}

}  // namespace

void check_nonfinite(const Case& c, const Plan& plan, Report& report) {
    const Inputs clean(c);
    const Results expected = run(clean, plan, report);
    const Sequence s = sequences(c)[0];
    for (int where = 0; where < 5; ++where) {
        const bool of_keys = where == int(Where::kK) || where == int(Where::kV);
        const int rows = of_keys ? s.seqlen_k : s.seqlen_q;
        for (const bool infinite : {false, true}) {
            // Infinite scores of one query, and infinite gradients of softmax_lse, may give anything.
            if (infinite && (where == int(Where::kQ) || where == int(Where::kDlse))) continue;
            const bool infinite_scores = infinite && where == int(Where::kK);
            for (const int row : {0, 17, 64, 130, rows - 1}) {
                if (row >= rows) continue;
                Inputs x(c, clean.values);
                put(x, Where(where), row, infinite, row % 2 == 0);
                const SelectingReference reference(c, x.values);
                if (reference.is_open()) continue;
                const std::string context =
                    format(" with %s in %s at row %d", infinite ? "inf" : "NaN", kWhere[where], row);
                compare_selected(context, run(x, plan, report), reference.results(), expected, infinite,
                                 infinite_scores, report);
            }
        }
    }
}

void check_hidden(const Case& c, const Plan& plan, Report& report) {
    const Inputs clean(c);
    Values values = clean.values;
    Forward expected = run_forward(clean, plan.schedules[0], report);
    for (const Sequence& s : sequences(c))
        for (const int key : {s.seqlen_k / 2, s.seqlen_k - 1})
            for (int head = 0; key >= 0 && head < c.num_heads_k; ++head) {
                const int element = (key + head) % c.head_dim_v;
                values.v.at(s.compact_k + key, head)[element] =
                    head % 2 ? std::numeric_limits<double>::infinity() : NAN;
                for (int h = 0; h < c.num_heads; ++h)
                    for (int i = 0; h / (c.num_heads / c.num_heads_k) == head && i < s.seqlen_q; ++i)
                        if (visible(c, s, i, key)) expected.out.at(s.compact_q + i, h)[element] = NAN;
            }
    const Inputs x(c, values);
    for (const Schedule schedule : plan.schedules) {
        Forward got = run_forward(x, schedule, report);
        for (double& value : got.out.x)
            if (std::isinf(value)) value = NAN;
        compare_bitwise("out beside NaN in V", got.out, expected.out, report);
        compare_bitwise("softmax_lse beside NaN in V", got.softmax_lse, expected.softmax_lse, report);
    }
}

}  // namespace flash_attn::runner
