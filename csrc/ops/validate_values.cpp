// The checks of the values of metadata tensors, in host memory.
#include <algorithm>
#include <utility>
#include <vector>
#include "ops/prepare.h"
#include "policy/dropout.h"
#include "policy/host_device.h"

namespace flash_attn {
namespace {

class ValueValidator {
public:
    ValueValidator(const ProblemArgs& args, const Problem& problem)
        : args_(args), problem_(problem), seqlens_(problem.seqlens), paged_(problem.paged_kv), reasons_(args) {}

    void check() {
        const bool paged = paged_.block_table;
        const bool only_starts = seqlens_.cu_seqlens_k && seqlens_.seqused_k;
        if (seqlens_.cu_seqlens_q) {
            check_cu_seqlens('q', seqlens_.cu_seqlens_q, &seqlens_.total_q, seqlens_.seqlen_q);
        }
        if (seqlens_.cu_seqlens_k && !only_starts) {
            check_cu_seqlens('k', seqlens_.cu_seqlens_k, paged ? nullptr : &seqlens_.total_k, seqlens_.seqlen_k);
        }
        if (only_starts) {
            check_starts_and_seqused();
        } else if (seqlens_.seqused_k) {
            check_seqused();
        }
        if (only_starts && args_.pass == Pass::kBackward) check_rows_are_apart();
        if (seqlens_.leftpad_k) check_leftpad();
        if (paged) check_block_table();
        check_starts("q_start", problem_.positions.q_starts, true);
        check_starts("k_start", problem_.positions.k_starts, false);
        reasons_.raise_if_any();
    }

private:
    static std::string at(const char* name, int64_t i) { return c10::str(name, '[', i, ']'); }

    // Each kind of mistake is reported once, at its first occurrence.
    void check_cu_seqlens(char side, const int32_t* cu_seqlens, const int64_t* total, int32_t max_seqlen) {
        const char* name = side == 'q' ? "cu_seqlens_q" : "cu_seqlens_k";
        const int batch_size = problem_.batch_size;
        if (cu_seqlens[0] != 0) reasons_.add(at(name, 0), "0", cu_seqlens[0]);
        int longest = 0;
        bool ordered = true;
        for (int b = 0; b < batch_size; ++b) {
            if (cu_seqlens[b + 1] < cu_seqlens[b] && ordered) {
                reasons_.add(at(name, b + 1), c10::str("at least ", at(name, b), '=', cu_seqlens[b]),
                             cu_seqlens[b + 1]);
                ordered = false;
            }
            if (length(cu_seqlens, b) > length(cu_seqlens, longest)) longest = b;
        }
        if (total && cu_seqlens[batch_size] > *total) {
            reasons_.add(at(name, batch_size), c10::str("at most total_", side, '=', *total), cu_seqlens[batch_size]);
        }
        if (batch_size > 0 && length(cu_seqlens, longest) > max_seqlen) {
            reasons_.add(c10::str("max_seqlen_", side),
                         c10::str("at least ", length(cu_seqlens, longest), ", the length of sequence ", longest),
                         max_seqlen);
        }
    }
    // Dense keys. A negative number counts as 0 keys.
    void check_seqused() {
        for (int b = 0; b < problem_.batch_size; ++b) {
            if (seqlens_.seqused_k[b] <= seqlens_.seqlen_k) continue;
            return reasons_.add(at("seqused_k", b), c10::str("at most seqlen_k=", seqlens_.seqlen_k),
                                seqlens_.seqused_k[b]);
        }
    }
    // Packed or paged keys: sequences may have gaps between them and be in any order.
    void check_starts_and_seqused() {
        const bool has_rows = !paged_.block_table;
        for (int b = 0; has_rows && b < problem_.batch_size; ++b) {
            const int64_t start = seqlens_.cu_seqlens_k[b], room = seqlens_.total_k - start;
            if (start < 0 || room < 0) {
                reasons_.add(at("cu_seqlens_k", b), c10::str("a row from 0 to total_k=", seqlens_.total_k), start);
                break;
            }
            if (used_k(b) > room) {
                reasons_.add(
                    at("seqused_k", b),
                    c10::str("at most ", room, ", the rows of k from ", at("cu_seqlens_k", b), '=', start, " on"),
                    used_k(b));
                break;
            }
        }
        for (int b = 0; b < problem_.batch_size; ++b) {
            if (used_k(b) <= seqlens_.seqlen_k) continue;
            reasons_.add("max_seqlen_k", c10::str("at least ", at("seqused_k", b), '=', used_k(b)), seqlens_.seqlen_k);
            break;
        }
    }
    // Sequences must not overlap: the backward pass writes each row of dk and dv for one sequence.
    void check_rows_are_apart() {
        std::vector<std::pair<int64_t, int>> starts;
        for (int b = 0; b < problem_.batch_size; ++b) {
            if (used_k(b) > 0) starts.emplace_back(seqlens_.cu_seqlens_k[b], b);
        }
        std::sort(starts.begin(), starts.end());
        for (size_t i = 1; i < starts.size(); ++i) {
            const auto [start, b] = starts[i - 1];
            const auto [next_start, next] = starts[i];
            if (start + used_k(b) <= next_start) continue;
            return reasons_.add(at("seqused_k", b),
                                c10::str("at most ", next_start - start, ", the rows of k before those of sequence ",
                                         next, ", for gradients belong to one sequence"),
                                used_k(b));
        }
    }
    // leftpad_k may exceed the number of valid keys: no key is left then.
    void check_leftpad() {
        for (int b = 0; b < problem_.batch_size; ++b) {
            if (seqlens_.leftpad_k[b] >= 0) continue;
            return reasons_.add(at("leftpad_k", b), "a number of at least 0", seqlens_.leftpad_k[b]);
        }
    }
    void check_block_table() {
        for (int b = 0; b < problem_.batch_size; ++b) {
            const int64_t pages = (used_k(b) + paged_.page_size - 1) / paged_.page_size;
            if (pages > paged_.max_pages) {
                reasons_.add("block_table",
                             c10::str("at least ", pages, " pages of ", paged_.page_size, " rows for the ", used_k(b),
                                      " keys of sequence ", b),
                             c10::str("max_pages=", paged_.max_pages));
                return;
            }
            const int64_t first = seqlens_.leftpad_k ? max(seqlens_.leftpad_k[b], 0) / paged_.page_size : 0;
            for (int64_t i = first; i < pages; ++i) {
                const int32_t page = paged_.block_table[b * paged_.batch_stride + i];
                if (page >= 0 && page < paged_.num_pages) continue;
                return reasons_.add(c10::str("block_table[", b, ", ", i, ']'),
                                    c10::str("a page from 0 to below num_pages=", paged_.num_pages), page);
            }
        }
    }

    void check_starts(const char* name, const int32_t* starts, bool is_q) {
        for (int b = 0; starts && b < problem_.batch_size; ++b) {
            const int64_t rows = is_q ? seqlen_q(b) : used_k(b), most = kMaxPosition - rows;
            if (starts[b] < 0 || starts[b] > most) {
                return reasons_.add(at(name, b), c10::str("a position from 0 to ", most), starts[b]);
            }
            if (problem_.dropout.threshold && starts[b] % kStartAlignment != 0) {
                const std::string multiple = c10::str("a multiple of ", kStartAlignment);
                return reasons_.add(at(name, b), multiple + ", as dropout_p is above 0", starts[b]);
            }
        }
    }

    static int64_t length(const int32_t* cu_seqlens, int b) { return int64_t(cu_seqlens[b + 1]) - cu_seqlens[b]; }
    int64_t seqlen_q(int b) const {
        return seqlens_.cu_seqlens_q ? length(seqlens_.cu_seqlens_q, b) : seqlens_.seqlen_q;
    }
    int64_t seqlen_k(int b) const {
        return seqlens_.cu_seqlens_k ? length(seqlens_.cu_seqlens_k, b) : seqlens_.seqlen_k;
    }
    int64_t used_k(int b) const { return seqlens_.seqused_k ? max(seqlens_.seqused_k[b], 0) : seqlen_k(b); }

    const ProblemArgs& args_;
    const Problem& problem_;
    const Seqlens& seqlens_;
    const PagedKv& paged_;
    Reasons reasons_;
};

}  // namespace

void validate_values(const ProblemArgs& args, const Problem& problem) {
    const Seqlens& s = problem.seqlens;
    const bool has_starts = problem.positions.q_starts || problem.positions.k_starts;
    if (s.cu_seqlens_q || s.seqused_k || s.leftpad_k || has_starts) ValueValidator(args, problem).check();
}

}  // namespace flash_attn
