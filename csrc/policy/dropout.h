// The dropout mask: Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the counter
// (batch, head, row, key), so the mask does not depend on tile shapes, threads or the device.
//
// One Philox call yields eight 16-bit numbers, for the pairs {row, row + 8} x {key, key + 8, key + 16, key + 24} of a
// 16 x 32 block. A thread's mma.sync or wgmma accumulators hold both rows and all four keys, so it uses all eight
// numbers; with transposed scores they hold two of the keys, and half of the numbers are used.
#pragma once
#include "policy/host_device.h"
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn {

// Seven rounds are the fewest that pass BigCrush (table 2 of the paper).
constexpr int kPhiloxRounds = 7;
constexpr int kDropoutBlockRows = 16, kDropoutBlockKeys = 32;
constexpr int kStartAlignment = 32;  // of shards, with dropout: blocks do not straddle them

struct PhiloxOutput { uint32_t word[4]; };

FA_HOST_DEVICE PhiloxOutput philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The dropout mask of one batch entry and head. Rows and keys are counted from the first ones at hand.
struct DropoutMask {
    uint32_t threshold, batch_head, first_row, first_key, seed_low, seed_high, offset;

    FA_HOST_DEVICE DropoutMask(const Problem& problem, const Sequence& seq, int batch, int head)
        : threshold(problem.dropout.threshold), first_row(uint32_t(seq.q_start)), first_key(uint32_t(seq.k_start)) {
        const DropoutParams& p = problem.dropout;
        const uint32_t total_heads = uint32_t(problem.num_heads) + uint32_t(p.heads_elsewhere);
        batch_head = uint32_t(batch) * total_heads + uint32_t(p.head_start + head);
        const uint64_t seed = p.state ? uint64_t(p.state[0]) : p.seed;
        const uint64_t full_offset = p.state ? uint64_t(p.state[1]) : p.offset;
        seed_low = uint32_t(seed);
        seed_high = uint32_t(seed >> 32) ^ uint32_t(full_offset >> 32);
        offset = uint32_t(full_offset);
    }

    // The eight numbers of the block that contains (row, key): word i holds (row, key + 8 i) in its low half and (row +
    // 8, key + 8 i) in its high half, for row and key in the first octet of the block.
    FA_HOST_DEVICE PhiloxOutput block(uint32_t row, uint32_t key) const {
        row += first_row, key += first_key;
        return philox(row / 16 * 8 + row % 8, key / 32 * 8 + key % 8, batch_head, offset, seed_low, seed_high);
    }
    FA_HOST_DEVICE bool drops(uint32_t row, uint32_t key) const {
        const uint32_t word = block(row, key).word[key / 8 % 4];
        return (row / 8 % 2 ? word >> 16 : word & 0xffffu) < threshold;
    }
};

// Rescale factor of the kept weights: 1 / (1 - the probability really used), so that the expectation is exact.
FA_HOST_DEVICE double dropout_rescale(const DropoutParams& p) { return 65536.0 / (65536.0 - double(p.threshold)); }

}  // namespace flash_attn
