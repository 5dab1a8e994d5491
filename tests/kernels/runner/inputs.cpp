#include "runner/inputs.h"
#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include "policy/host_device.h"
#include "policy/mask.h"
#include "policy/scalars.h"
#include "runner/elements.h"

namespace flash_attn::runner {
namespace {

class Random {
public:
    Random(int seed, int stream) : state_(mix(mix(uint64_t(seed)) + uint64_t(stream))) {}
    uint64_t next() { return mix(state_++); }
    double uniform() { return (double(next() >> 11) + 0.5) * 0x1p-53; }
    double normal() {  // Box and Muller
        const double radius = std::sqrt(-2 * std::log(uniform()));
        return radius * std::cos(2 * std::numbers::pi * uniform());
    }

private:
    uint64_t state_;
};

// Each tensor has random numbers of its own, which do not depend on other sizes.
enum Stream { kQ, kK, kV, kDout, kDlse, kSlopes, kPages, kSinks };

Compact random_rows(const Case& c, Stream stream, int rows, int heads, int head_dim) {
    Random random(c.seed, stream);
    Compact compact(rows, heads, head_dim);
    for (double& x : compact.x) x = random.normal();
    return compact;
}

void round_all(const Case& c, Compact& compact, double factor) {
    for (double& x : compact.x) x = round_to(c.type, float(x * factor));
}

int pages_needed(const Case& c) {
    int needed = 0;
    for (const int n : c.seqlens_k) needed += ceil_div(n, c.page_size);
    return needed;
}

constexpr int kSparePages = 2;

}  // namespace

Shape shape_q(const Case& c, int head_dim) {
    const int total = std::accumulate(c.seqlens_q.begin(), c.seqlens_q.end(), c.unused_rows);
    return {c.packed ? 1 : c.batch_size(), c.packed ? total : c.seqlen_q(), c.num_heads, head_dim};
}

Shape shape_k(const Case& c, int head_dim) {
    if (c.paged()) return {pages_needed(c) + kSparePages, c.page_size, c.num_heads_k, head_dim};
    const int total = std::accumulate(c.seqlens_k.begin(), c.seqlens_k.end(), c.unused_rows);
    return {c.packed ? 1 : c.batch_size(), c.packed ? total : c.seqlen_k(), c.num_heads_k, head_dim};
}

Values make_values(const Case& c) {
    const int rows_q = total_rows_q(c), rows_k = total_rows_k(c);
    Values x;
    x.q = random_rows(c, kQ, rows_q, c.num_heads, c.head_dim);
    x.k = random_rows(c, kK, rows_k, c.num_heads_k, c.head_dim);
    x.v = random_rows(c, kV, rows_k, c.num_heads_k, c.head_dim_v);
    x.dout = random_rows(c, kDout, rows_q, c.num_heads, c.head_dim_v);
    x.dlse = random_rows(c, kDlse, rows_q, c.num_heads, 1);
    // Products of queries and keys, and values, that fp16 cannot hold the sum of two of; see check "large".
    const bool large = c.check == "large";
    round_all(c, x.q, large ? 80 : 1);
    round_all(c, x.k, large ? 80 : 1);
    round_all(c, x.v, large ? 10000 : 1);
    round_all(c, x.dout, large ? 1e-4 : 1);
    for (double& d : x.dlse.x) d = float(d);
    if (!c.alibi.empty()) {
        Random random(c.seed, kSlopes);
        x.slopes.resize(size_t(c.batch_size()) * size_t(c.num_heads));
        for (size_t i = 0; i < x.slopes.size(); ++i) {
            const bool repeated = c.alibi == "heads" && i >= size_t(c.num_heads);
            // Some grow with the distance, far beyond what exp can hold.
            const double fresh = i % 2 ? -random.uniform() : 0.3 * random.uniform();
            x.slopes[i] = repeated ? x.slopes[i - size_t(c.num_heads)] : float(fresh);
        }
    }
    if (!c.s_aux.empty()) {
        // Some outweigh every score, and some weigh nothing.
        const float centres[] = {0, 5, -300, 80};
        Random random(c.seed, kSinks);
        for (int h = 0; h < c.num_heads; ++h)
            x.sinks.push_back(centres[size_t(c.seed + h) % std::size(centres)] + float(random.normal()));
        if (c.s_aux == "some") x.sinks[0] = -INFINITY;
    }
    x.seed = (uint64_t(c.seed) << 32 | 12345) + uint64_t(c.seed);
    x.offset = uint64_t(1) << 33 | 64;
    return x;
}

Inputs::Inputs(const Case& c) : Inputs(c, make_values(c)) {}

Inputs::Inputs(const Case& c, Values given)
    : c(c), values(std::move(given)), q(shape_q(c, c.head_dim), c.layout, Access::kRead),
      k(shape_k(c, c.head_dim), c.layout, Access::kRead), v(shape_k(c, c.head_dim_v), c.layout, Access::kRead),
      dout(shape_q(c, c.head_dim_v), c.layout, Access::kRead),
      dlse(q.shape().batch, c.num_heads, q.shape().rows, c.layout) {
    if (c.paged()) make_pages();
    make_metadata();
    write_values();
}

void Inputs::make_pages() {
    num_pages = pages_needed(c) + kSparePages;
    max_pages = ceil_div(c.seqlen_k(), c.page_size) + 1;
    std::vector<int32_t> order(size_t(num_pages), 0);
    std::iota(order.begin(), order.end(), 0);
    Random random(c.seed, kPages);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.next() % i]);
    pages.assign(size_t(c.batch_size()) * size_t(max_pages), 0);
    for (int b = 0; b < c.batch_size(); ++b)
        for (int page = 0; page < ceil_div(c.seqlens_k[b], c.page_size); ++page, order.pop_back())
            pages[size_t(b * max_pages + page)] = order.back();
    block_table = Numbers<int32_t>(pages);
}

void Inputs::make_metadata() {
    if (c.packed) {
        std::vector<int32_t> starts_q{0}, starts_k{0};
        for (const int n : c.seqlens_q) starts_q.push_back(starts_q.back() + n);
        for (const int n : c.seqlens_k) starts_k.push_back(starts_k.back() + n);
        cu_seqlens_q = Numbers<int32_t>(starts_q);
        cu_seqlens_k = Numbers<int32_t>(starts_k);
    }
    if (!c.seqused_k.empty()) seqused_k = Numbers<int32_t>({c.seqused_k.begin(), c.seqused_k.end()});
    if (!c.leftpad_k.empty()) leftpad_k = Numbers<int32_t>({c.leftpad_k.begin(), c.leftpad_k.end()});
    if (!c.q_starts.empty()) q_starts = Numbers<int32_t>({c.q_starts.begin(), c.q_starts.end()});
    if (!c.k_starts.empty()) k_starts = Numbers<int32_t>({c.k_starts.begin(), c.k_starts.end()});
    if (c.alibi == "batch") alibi_slopes = Numbers<float>(values.slopes);
    // A batch of no sequences has slopes all the same.
    if (c.alibi == "heads") {
        std::vector<float> slopes = values.slopes;
        slopes.resize(size_t(c.num_heads), 0);
        alibi_slopes = Numbers<float>(slopes);
    }
    if (!c.s_aux.empty()) sinks = Numbers<float>(values.sinks);
    if (!c.key_ranges.empty()) make_key_ranges();
    rng_state = Numbers<int64_t>({int64_t(values.seed), int64_t(values.offset)});
}

// In rows of no sequence, ranges are unbounded.
void Inputs::make_key_ranges() {
    const int rows = c.packed ? q.shape().rows : c.batch_size() * c.seqlen_q();
    std::vector<int32_t> numbers;
    for (int row = 0; row < (c.shares_ranges() ? c.seqlen_q() : rows); ++row)
        numbers.insert(numbers.end(), {0, c.seqlen_k()});
    for (const Sequence& s : sequences(c))
        for (int i = 0; i < s.seqlen_q; ++i) {
            const KeyRange range = key_range(c, s, i);
            const size_t row = size_t(c.shares_ranges() ? i : s.batch * c.seqlen_q() + s.first_q + i);
            numbers[2 * row] = range.begin, numbers[2 * row + 1] = range.end;
        }
    key_ranges = Numbers<int32_t>(numbers);
}

uint16_t& Inputs::k_element(const Tensor& t, const Sequence& s, int j, int head, int d) const {
    if (!c.paged()) return t.at(s.batch, s.first_k + j, head, d);
    const int row = j + (c.leftpad_k.empty() ? 0 : c.leftpad_k[size_t(s.index)]);
    return t.at(pages[size_t(s.index * max_pages + row / c.page_size)], row % c.page_size, head, d);
}

void Inputs::write_values() {
    for (const Sequence& s : sequences(c)) {
        for (int i = 0; i < s.seqlen_q; ++i)
            for (int h = 0; h < c.num_heads; ++h) {
                const int row = s.compact_q + i;
                for (int d = 0; d < c.head_dim; ++d)
                    q_element(q, s, i, h, d) = to_bits(c.type, float(values.q.at(row, h)[d]));
                for (int d = 0; d < c.head_dim_v; ++d)
                    q_element(dout, s, i, h, d) = to_bits(c.type, float(values.dout.at(row, h)[d]));
                dlse.at(s.batch, h, s.first_q + i) = float(*values.dlse.at(row, h));
            }
        for (int j = 0; j < s.seqlen_k; ++j)
            for (int h = 0; h < c.num_heads_k; ++h) {
                const int row = s.compact_k + j;
                for (int d = 0; d < c.head_dim; ++d)
                    k_element(k, s, j, h, d) = to_bits(c.type, float(values.k.at(row, h)[d]));
                for (int d = 0; d < c.head_dim_v; ++d)
                    k_element(v, s, j, h, d) = to_bits(c.type, float(values.v.at(row, h)[d]));
            }
    }
}

// Every other case has one number for all sequences, if they have the same.
Positions Inputs::positions() const {
    const auto all_same = [](const std::vector<int>& starts) {
        return std::all_of(starts.begin(), starts.end(), [&](int start) { return start == starts[0]; });
    };
    const bool in_numbers = c.seed % 2 == 0 && all_same(c.q_starts) && all_same(c.k_starts);
    if (!in_numbers) return {c.placed(), q_starts.data(), k_starts.data(), 0, 0};
    const auto first = [](const std::vector<int>& starts) { return starts.empty() ? 0 : starts[0]; };
    return {c.placed(), nullptr, nullptr, first(c.q_starts), first(c.k_starts)};
}

Problem Inputs::problem() const {
    Problem p{};
    p.type = c.type;
    p.batch_size = c.batch_size(), p.num_heads = c.num_heads, p.num_heads_k = c.num_heads_k;
    p.head_dim = c.head_dim, p.head_dim_v = c.head_dim_v;
    p.q = q.view(c.packed);
    p.k = k.view(c.packed && !c.paged());
    p.v = v.view(c.packed && !c.paged());
    p.seqlens = {cu_seqlens_q.data(), cu_seqlens_k.data(), seqused_k.data(), leftpad_k.data(), 0, 0,
                 c.seqlen_q(),        c.seqlen_k(),        c.seqlen_new};
    if (c.packed) p.seqlens.total_q = q.shape().rows, p.seqlens.total_k = c.paged() ? 0 : k.shape().rows;
    if (c.paged()) p.paged_kv = {block_table.data(), max_pages, max_pages, num_pages, c.page_size};
    p.window = {c.window_left < 0 ? kMaxSeqlen : c.window_left, c.window_right < 0 ? kMaxSeqlen : c.window_right};
    p.chunks = make_chunks(c.attention_chunk);
    if (c.causal) p.window.right = 0;
    p.score = {c.scale(), c.softcap, alibi_slopes.data(), c.alibi == "batch" ? c.num_heads : 0, sinks.data()};
    if (c.dropout_p > 0) {
        // Every other case has the state where only the device reads it.
        const bool on_device = c.seed % 2;
        p.dropout = {c.dropout_threshold(),
                     on_device ? 0 : values.seed,
                     on_device ? 0 : values.offset,
                     on_device ? rng_state.data() : nullptr,
                     c.head_start,
                     c.total_heads ? c.total_heads - c.num_heads : 0};
    }
    p.key_ranges.ranges = key_ranges.data();
    p.key_ranges.batch_stride = c.packed || c.shares_ranges() ? 0 : c.seqlen_q();
    p.positions = positions();
    p.float_results = c.float_results;
    round_scalars(p);
    return p;
}

}  // namespace flash_attn::runner
