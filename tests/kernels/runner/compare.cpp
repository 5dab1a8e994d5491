#include "runner/compare.h"
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace flash_attn::runner {
namespace {

std::string place(const Compact& t, size_t at) {
    const size_t dim = size_t(t.head_dim), heads = size_t(t.heads);
    return format("row %zu head %zu element %zu", at / dim / heads, at / dim % heads, at % dim);
}

bool is_misplaced(double got, double expected) {
    if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) != std::isnan(expected);
    return (std::isinf(got) || std::isinf(expected)) && got != expected;
}

// The largest |a - b| where b is finite, and where it is; NaN if there is one among them.
std::pair<double, size_t> largest_error(const Compact& a, const Compact& b) {
    std::pair<double, size_t> worst{0, 0};
    for (size_t i = 0; i < b.x.size(); ++i) {
        const double error = std::isfinite(b.x[i]) ? std::abs(a.x[i] - b.x[i]) : 0;
        if (!(error <= worst.first)) worst = {error, i};
    }
    return worst;
}

}  // namespace

std::string format(const char* text, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, text);
    std::vsnprintf(buffer, sizeof buffer, text, arguments);
    va_end(arguments);
    return buffer;
}

void Report::fail(const std::string& text) {
    failures_.push_back(text);
    if (prints_) std::printf("  WRONG %s\n", text.c_str());
}

void Report::note(const std::string& text) const {
    if (prints_) std::printf("  %s\n", text.c_str());
}

void compare(const std::string& what, const Compact& got, const Compact& expected,
             const std::vector<const Compact*>& plain, Rule rule, Report& report) {
    size_t misplaced = 0, first = 0;
    for (size_t i = expected.x.size(); i-- > 0;)
        if (is_misplaced(got.x[i], expected.x[i])) ++misplaced, first = i;
    if (misplaced)
        return report.fail(format("%s: NaN or infinity misplaced at %zu of %zu, first %s: got %g, expected %g",
                                  what.c_str(), misplaced, got.x.size(), place(got, first).c_str(), got.x[first],
                                  expected.x[first]));
    double largest = rule.size, plain_error = 0;
    for (const double x : expected.x)
        if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
    for (const Compact* p : plain) plain_error = std::max(plain_error, largest_error(*p, expected).first);
    const double allowed = 2 * rule.eps * largest + rule.factor * plain_error;
    const auto [worst, at] = largest_error(got, expected);
    const std::string text =
        format("%s: error %.3e, allowed %.3e, plain %.3e", what.c_str(), worst, allowed, plain_error);
    if (worst <= allowed) return report.note(text);
    report.fail(text + format("; %s: got %.9g, expected %.9g", place(got, at).c_str(), got.x[at], expected.x[at]));
}

void compare_bitwise(const std::string& what, const Compact& got, const Compact& expected, Report& report) {
    size_t different = 0, first = 0;
    for (size_t i = expected.x.size(); i-- > 0;) {
        const double a = got.x[i], b = expected.x[i];
        const bool same = std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0;
        if (!same) ++different, first = i;
    }
    if (different)
        report.fail(format("%s: %zu of %zu differ, first %s: got %.9g, expected %.9g", what.c_str(), different,
                           got.x.size(), place(got, first).c_str(), got.x[first], expected.x[first]));
}

}  // namespace flash_attn::runner
