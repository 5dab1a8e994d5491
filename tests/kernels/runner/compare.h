// Comparison of a result with its reference: first where NaN and infinities are, then how large the error is.
#pragma once
#include <string>
#include <vector>
#include "runner/inputs.h"

namespace flash_attn::runner {

// What was wrong with a case; what was measured is printed as well if that is asked for.
class Report {
public:
    explicit Report(bool prints = false) : prints_(prints) {}
    void fail(const std::string& text);
    void note(const std::string& text) const;
    bool failed() const { return !failures_.empty(); }
    const std::vector<std::string>& failures() const { return failures_; }

private:
    bool prints_;
    std::vector<std::string> failures_;
};

// As in tests/compare.py: the largest error may be `factor` times that of the plain results plus two eps of the type
// times the largest reference value, or times `size` if that is more.
struct Rule { double eps, factor = 2, size = 0; };

void compare(const std::string& what, const Compact& got, const Compact& expected,
             const std::vector<const Compact*>& plain, Rule rule, Report& report);

// The same bits, any NaN counting as equal to any other.
void compare_bitwise(const std::string& what, const Compact& got, const Compact& expected, Report& report);

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

}  // namespace flash_attn::runner
