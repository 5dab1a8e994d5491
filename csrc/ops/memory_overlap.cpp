#include "ops/memory_overlap.h"
#include <c10/util/SmallVector.h>
#include <algorithm>
#include <numeric>

namespace flash_attn {
namespace {

// Indices times strides, in bytes, from `least` to `most` times `stride`.
struct Term { int64_t stride, least, most; };

// Whether the terms can add up to a number: a bounded linear Diophantine equation.
class Sum {
public:
    explicit Sum(c10::SmallVector<Term, 10> terms) : terms_(std::move(terms)) {
        std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
        rest_.resize(terms_.size() + 1, {0, 0, 0});
        for (size_t i = terms_.size(); i-- > 0;) {
            const auto& [stride, least, most] = terms_[i];
            const Rest& next = rest_[i + 1];
            rest_[i] = {next.least + least * stride, next.most + most * stride, std::gcd(next.divisor, stride)};
        }
    }
    bool can_be(int64_t number) { return can_be(number, 0); }

private:
    // The sums of the terms from one on lie between `least` and `most` and are multiples of `divisor`.
    struct Rest { int64_t least, most, divisor; };

    bool can_be(int64_t number, size_t first) {
        const Rest& all = rest_[first];
        if (number < all.least || number > all.most) return false;
        if (first == terms_.size()) return true;
        if (number % all.divisor != 0 || ++steps_ > kMaxSteps) return false;
        // Two factors at most, unless what follows reaches further than the stride.
        const auto& [stride, least, most] = terms_[first];
        const Rest& next = rest_[first + 1];
        const int64_t lowest = std::max(least, ceil_div(number - next.most, stride)),
                      highest = std::min(most, floor_div(number - next.least, stride));
        for (int64_t factor = lowest; factor <= highest && steps_ <= kMaxSteps; ++factor) {
            if (can_be(number - factor * stride, first + 1)) return true;
        }
        return false;
    }
    static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
    static int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

    static constexpr int kMaxSteps = 1000;  // some microseconds
    c10::SmallVector<Term, 10> terms_;
    c10::SmallVector<Rest, 11> rest_;
    int steps_ = 0;
};

// Bytes from the first to the end of the last.
int64_t extent(const at::Tensor& t) {
    int64_t bytes = int64_t(t.itemsize());
    for (int64_t i = 0; i < t.dim(); ++i) bytes += (t.size(i) - 1) * t.stride(i) * int64_t(t.itemsize());
    return bytes;
}

}  // namespace

bool share_memory(const at::Tensor& a, const at::Tensor& b) {
    if (a.numel() == 0 || b.numel() == 0 || !a.storage().is_alias_of(b.storage())) return false;
    const int64_t size_a = int64_t(a.itemsize()), size_b = int64_t(b.itemsize());
    const int64_t apart = b.storage_offset() * size_b - a.storage_offset() * size_a;
    if (apart >= extent(a) || -apart >= extent(b)) return false;
    c10::SmallVector<Term, 10> terms = {{1, 1 - size_b, size_a - 1}};  // the bytes within elements
    for (const at::Tensor* t : {&a, &b}) {
        for (int64_t i = 0; i < t->dim(); ++i) {
            const int64_t stride = t->stride(i) * int64_t(t->itemsize()), last = t->size(i) - 1;
            if (stride == 0 || last == 0) continue;
            const auto same =
                std::find_if(terms.begin(), terms.end(), [&](const Term& x) { return x.stride == stride; });
            Term& term = same == terms.end() ? terms.emplace_back(Term{stride, 0, 0}) : *same;
            (t == &a ? term.most : term.least) += t == &a ? last : -last;
        }
    }
    return Sum(terms).can_be(apart);
}

bool overlaps_itself(const at::Tensor& t) {
    if (t.numel() == 0 || t.is_non_overlapping_and_dense()) return false;
    const int64_t size = int64_t(t.itemsize());
    // Two elements whose indices are equal before dimension i and differ there.
    for (int64_t i = 0; i < t.dim(); ++i) {
        if (t.size(i) == 1) continue;
        if (t.stride(i) == 0) return true;
        c10::SmallVector<Term, 10> terms = {{1, 1 - size, size - 1}, {t.stride(i) * size, 1, t.size(i) - 1}};
        for (int64_t j = i + 1; j < t.dim(); ++j) {
            if (t.stride(j) != 0) terms.push_back({t.stride(j) * size, 1 - t.size(j), t.size(j) - 1});
        }
        if (Sum(terms).can_be(0)) return true;
    }
    return false;
}

}  // namespace flash_attn
