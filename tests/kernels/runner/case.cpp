#include "runner/case.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <sstream>
#include "runner/elements.h"

namespace flash_attn::runner {
namespace {

[[noreturn]] void reject(const std::string& word) {
    std::fprintf(stderr, "not understood in the line of a case: %s\n", word.c_str());
    std::exit(2);
}

int to_int(const std::string& text) {
    char* end = nullptr;
    const long value = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end) reject(text);
    return int(value);
}

double to_double(const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end) reject(text);
    return value;
}

std::vector<int> to_ints(const std::string& text) {
    std::vector<int> values;
    std::istringstream words(text);
    for (std::string word; std::getline(words, word, ',');) values.push_back(to_int(word));
    return values;
}

ElementType to_type(const std::string& text) {
    if (text == "bfloat16") return ElementType::kBFloat16;
    if (text == "float16") return ElementType::kFloat16;
    reject(text);
}

Layout to_layout(const std::string& text) {
    const std::map<std::string, Layout> layouts{{"rows", Layout::kRows},
                                                {"heads", Layout::kHeads},
                                                {"gaps", Layout::kGaps},
                                                {"chunks", Layout::kChunks},
                                                {"far", Layout::kFar}};
    const auto found = layouts.find(text);
    if (found == layouts.end()) reject(text);
    return found->second;
}

using Setter = std::function<void(Case&, const std::string&)>;

Setter set(int Case::* field) {
    return [field](Case& c, const std::string& text) { c.*field = to_int(text); };
}
Setter set(bool Case::* field) {
    return [field](Case& c, const std::string& text) { c.*field = to_int(text) != 0; };
}
Setter set(double Case::* field) {
    return [field](Case& c, const std::string& text) { c.*field = to_double(text); };
}
Setter set(std::string Case::* field) {
    return [field](Case& c, const std::string& text) { c.*field = text; };
}
Setter set(std::vector<int> Case::* field) {
    return [field](Case& c, const std::string& text) { c.*field = to_ints(text); };
}

void set_window(Case& c, const std::string& text) {
    const std::vector<int> window = to_ints(text);
    if (window.size() != 2) reject(text);
    c.window_left = window[0], c.window_right = window[1];
}

const std::map<std::string, Setter>& setters() {
    static const std::map<std::string, Setter> table{
        {"seqlens_q", set(&Case::seqlens_q)},
        {"seqlens_k", set(&Case::seqlens_k)},
        {"dtype", [](Case& c, const std::string& text) { c.type = to_type(text); }},
        {"num_heads", set(&Case::num_heads)},
        {"num_heads_k", set(&Case::num_heads_k)},
        {"head_dim", set(&Case::head_dim)},
        {"head_dim_v", set(&Case::head_dim_v)},
        {"packed", set(&Case::packed)},
        {"causal", set(&Case::causal)},
        {"window_size", set_window},
        {"attention_chunk", set(&Case::attention_chunk)},
        {"softcap", set(&Case::softcap)},
        {"softmax_scale", set(&Case::softmax_scale)},
        {"alibi", set(&Case::alibi)},
        {"dropout_p", set(&Case::dropout_p)},
        {"seqused_k", set(&Case::seqused_k)},
        {"leftpad_k", set(&Case::leftpad_k)},
        {"seqlen_new", set(&Case::seqlen_new)},
        {"page_size", set(&Case::page_size)},
        {"unused_rows", set(&Case::unused_rows)},
        {"q_starts", set(&Case::q_starts)},
        {"k_starts", set(&Case::k_starts)},
        {"head_start", set(&Case::head_start)},
        {"total_heads", set(&Case::total_heads)},
        {"float_results", set(&Case::float_results)},
        {"lse_grad", set(&Case::lse_grad)},
        {"s_aux", set(&Case::s_aux)},
        {"max_logits", set(&Case::max_logits)},
        {"key_ranges", set(&Case::key_ranges)},
        {"seqlen_q_if_empty", set(&Case::seqlen_q_if_empty)},
        {"seqlen_k_if_empty", set(&Case::seqlen_k_if_empty)},
        {"seed", set(&Case::seed)},
        {"check", set(&Case::check)},
        {"layout", [](Case& c, const std::string& text) { c.layout = to_layout(text); }},
        {"smem", set(&Case::smem)},
        {"compute_capability", set(&Case::compute_capability)},
        {"multiprocessors", set(&Case::multiprocessors)},
        {"deterministic", set(&Case::deterministic)},
    };
    return table;
}

void check_lengths(const Case& c, const std::string& line) {
    const size_t batch_size = c.seqlens_q.size();
    bool good = c.seqlens_k.size() == batch_size && (c.seqlen_new == 0 || (!c.packed && !c.seqused_k.empty()));
    for (const auto* values : {&c.seqused_k, &c.leftpad_k, &c.q_starts, &c.k_starts})
        good &= values->empty() || values->size() == batch_size;
    for (const int n : c.seqlens_q) good &= c.packed || n == c.seqlen_q();
    for (const int n : c.seqlens_k) good &= c.packed || n == c.seqlen_k();
    if (!good || c.num_heads % c.num_heads_k) reject(line);
}

// Of the keys of a sequence in use, the one after the last; a negative number in seqused_k stands for no keys.
int end_of_keys(const Case& c, int b) {
    if (c.seqused_k.empty()) return c.seqlens_k[b];
    return c.seqused_k[b] < 0 ? 0 : std::min(c.seqused_k[b] + c.seqlen_new, c.seqlens_k[b]);
}

int longest(const std::vector<int>& lengths, int if_empty) {
    return lengths.empty() ? if_empty : *std::max_element(lengths.begin(), lengths.end());
}

}  // namespace

int Case::seqlen_q() const { return longest(seqlens_q, seqlen_q_if_empty); }
int Case::seqlen_k() const { return longest(seqlens_k, seqlen_k_if_empty); }
double Case::scale() const { return softmax_scale > 0 ? softmax_scale : 1 / std::sqrt(double(head_dim)); }
uint32_t Case::dropout_threshold() const { return uint32_t(std::min(std::lround(dropout_p * 65536), 65535L)); }

Case parse_case(const std::string& line) {
    Case c;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
        const size_t equals = word.find('=');
        const auto setter = setters().find(word.substr(0, equals));
        if (equals == std::string::npos || setter == setters().end()) reject(word);
        setter->second(c, word.substr(equals + 1));
    }
    check_lengths(c, line);
    return c;
}

std::vector<Sequence> sequences(const Case& c) {
    std::vector<Sequence> found;
    int start_q = 0, start_k = 0, compact_k = 0;
    for (int b = 0; b < c.batch_size(); ++b) {
        const int end = end_of_keys(c, b);
        const int begin = c.leftpad_k.empty() ? 0 : std::min(c.leftpad_k[b], end);
        const int q_start = c.q_starts.empty() ? 0 : c.q_starts[b], k_start = c.k_starts.empty() ? 0 : c.k_starts[b];
        Sequence s{b, b, 0, c.seqlens_q[b], begin, end - begin, start_q, compact_k, q_start, k_start};
        if (c.packed) s.batch = 0, s.first_q = start_q, s.first_k = start_k + begin;
        found.push_back(s);
        start_q += c.seqlens_q[b], start_k += c.seqlens_k[b], compact_k += end - begin;
    }
    return found;
}

int total_rows_q(const Case& c) {
    int total = 0;
    for (const Sequence& s : sequences(c)) total += s.seqlen_q;
    return total;
}

int total_rows_k(const Case& c) {
    int total = 0;
    for (const Sequence& s : sequences(c)) total += s.seqlen_k;
    return total;
}

bool visible(const Case& c, const Sequence& s, int i, int j) {
    const KeyRange range = key_range(c, s, i);
    return range.begin <= j && j < range.end && visible_in_window(c, s, i, j);
}

bool visible_in_window(const Case& c, const Sequence& s, int i, int j) {
    const int distance = s.distance(c, i, j), right = c.causal ? 0 : c.window_right;
    const int key = s.k_start + j, query = key + distance;
    const bool same_chunk =
        c.attention_chunk == 0 || (query >= 0 && query / c.attention_chunk == key / c.attention_chunk);
    return same_chunk && (c.window_left < 0 || distance <= c.window_left) && (right < 0 || -distance <= right);
}

KeyRange key_range(const Case& c, const Sequence& s, int i) {
    constexpr int kLargest = std::numeric_limits<int>::max(), kSmallest = std::numeric_limits<int>::min();
    const std::string& pattern = c.key_ranges;
    if (pattern.empty()) return {kSmallest, kLargest};
    // What sequences share does not depend on their lengths.
    const bool shared = c.shares_ranges();
    const int rows = shared ? c.seqlen_q() : s.seqlen_q, keys = shared ? c.seqlen_k() : s.seqlen_k;
    const int position = i + keys - rows, size = c.seed % 2 ? 50 : 128;  // of documents: tiles straddle them, or do not
    if (pattern == "prefix") return {0, std::max(keys / 3, position + 1)};
    if (pattern == "documents") {
        const int first = position < 0 ? -size : position / size * size;
        return {first, first + size};
    }
    // Neighbouring queries see keys far from each other, and queries far from each other see one key.
    if (pattern == "shuffled") {
        const int first = int(mix(uint64_t(c.seed + i / 40)) % uint64_t(keys / size + 1)) * size;
        return {first, first + size};
    }
    const uint64_t bits = mix(uint64_t(c.seed) << 32 | uint64_t(i));
    const auto anywhere = [&](int from) { return int(bits >> from & 0xffff) % (keys + 40) - 20; };
    if (pattern == "random" || pattern == "shared") return {anywhere(0), anywhere(16)};
    if (pattern != "hostile") reject(pattern);
    if (i / 70 % 3 == 1) return {anywhere(0) + keys + 20, anywhere(16)};  // tiles without keys
    const KeyRange ranges[] = {{kSmallest, kLargest},      {kLargest, kSmallest},      {kSmallest, anywhere(0)},
                               {anywhere(0), kLargest},    {kLargest, kLargest},       {kSmallest, kSmallest},
                               {anywhere(0), anywhere(0)}, {anywhere(0), anywhere(16)}};
    return ranges[bits >> 61];
}

}  // namespace flash_attn::runner
