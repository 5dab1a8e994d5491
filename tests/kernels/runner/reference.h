// Attention as the formula says, with the whole matrix and an explicit mask, head by head: in fp64, what results are
// compared with; rounded to the type of the inputs after every operation, the plain attention whose error says how
// large an error may be.
#pragma once
#include <vector>
#include "runner/case.h"
#include "runner/inputs.h"

namespace flash_attn::runner {

struct Attention {
    Compact out, softmax_lse;  // softmax_lse: [rows, heads, 1]
    Compact max_logits;        // [sequences, heads, 1]
    Compact dq, dk, dv;        // if asked for
};

enum class Precision { kFloat64, kFloat32, kAsInputs, kAsInputsWide };  // wide: fp16 without overflow

// In which order sums are added up and when scores are scaled: it changes nothing but rounding.
struct Order { bool keys_reversed, dims_reversed, scale_first; };

Attention attention(const Case& c, const Values& values, Precision precision, bool grads, Order order = {});

// The attention of fp64, and what it is compared with.
struct Yardstick {
    Attention exact;
    std::vector<Attention>
        plain;  // in several orders, as a single one may be exact by luck; softmax_lse and max_logits are of fp32
};
Yardstick make_yardstick(const Case& c, const Values& values, bool grads);

// Whether dropout drops the weight, by Philox written down a second time.
bool dropped(const Case& c, const Values& values, const Sequence& s, int head, int i, int j);

// Softmax weights before dropout, of fp64, 0 outside: [seqlen_q, seqlen_k] of one head of one sequence.
std::vector<double> attn_probs(const Case& c, const Values& values, const Sequence& s, int head);

}  // namespace flash_attn::runner
