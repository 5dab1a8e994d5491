// Instructions that the lanes of a warp execute together. Lanes leave their operands in the warp's buffer, the last to
// arrive computes for all, each takes its result.
#include "runtime/element.h"
#include "runtime/runtime.h"

namespace sim {
namespace {

constexpr char kShfl[] = "shfl.xor", kElect[] = "elect.sync";
constexpr char kLdmatrix[] = "ldmatrix", kLdmatrixTrans[] = "ldmatrix.trans";
constexpr char kStmatrix[] = "stmatrix", kStmatrixTrans[] = "stmatrix.trans";
constexpr char kMmaBf16[] = "mma.m16n8k16.bf16", kMmaFp16[] = "mma.m16n8k16.f16";

using Half = uint16_t __attribute__((may_alias));
using Word = uint32_t __attribute__((may_alias));

// ---------------------------------------------------------------- ldmatrix, stmatrix
void check_row(const char* what, const void* row) {
    const uint32_t address = smem_address(row);
    if (address % 16) fail("%s: row address smem+%td is not 16-byte aligned", what, (const char*)row - smem());
    smem_at(*self->block, address, 16);
}

// Lane l gave the address of row l % 8 of matrix l / 8. Lane t gets elements 2 (t % 4) and + 1 of row t / 4.
void load_matrices(CollectiveBuffer& x) {
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 8; ++i) {
            const Word* row = static_cast<const Word*>(x.address[8 * m + i]);
            for (int j = 0; j < 4; ++j) x.regs[4 * i + j].r[m] = row[j];
        }
}
void load_matrices_transposed(CollectiveBuffer& x) {
    for (int m = 0; m < 4; ++m)
        for (int j = 0; j < 4; ++j) {
            const Half* even = static_cast<const Half*>(x.address[8 * m + 2 * j]);
            const Half* odd = static_cast<const Half*>(x.address[8 * m + 2 * j + 1]);
            for (int i = 0; i < 8; ++i) x.regs[4 * i + j].r[m] = even[i] | uint32_t{odd[i]} << 16;
        }
}
void store_matrices(const CollectiveBuffer& x) {
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 8; ++i) {
            Word* row = static_cast<Word*>(x.address[8 * m + i]);
            for (int j = 0; j < 4; ++j) row[j] = x.regs[4 * i + j].r[m];
        }
}
void store_matrices_transposed(const CollectiveBuffer& x) {
    for (int m = 0; m < 4; ++m)
        for (int j = 0; j < 4; ++j) {
            Half* even = static_cast<Half*>(x.address[8 * m + 2 * j]);
            Half* odd = static_cast<Half*>(x.address[8 * m + 2 * j + 1]);
            for (int i = 0; i < 8; ++i) {
                even[i] = static_cast<uint16_t>(x.regs[4 * i + j].r[m]);
                odd[i] = static_cast<uint16_t>(x.regs[4 * i + j].r[m] >> 16);
            }
        }
}

// ---------------------------------------------------------------- mma
using Words8 = uint32_t __attribute__((vector_size(32)));
using Floats8 = float __attribute__((vector_size(32)));

// Eight pairs as two vectors of eight floats.
struct Unpacked { Floats8 lo, hi; };
Unpacked unpack_bf16(Words8 pairs) {
    return {reinterpret_cast<Floats8>(pairs << 16), reinterpret_cast<Floats8>(pairs & 0xffff0000u)};
}
Floats8 fp16_to_floats(Words8 bits) {
    const Words8 magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const Words8 scaled = reinterpret_cast<Words8>(reinterpret_cast<Floats8>(magnitude) * 0x1p112f);
    const auto special = (bits & 0x7c00) == 0x7c00;
    return reinterpret_cast<Floats8>(sign | (special ? magnitude | 0x7f800000u : scaled));
}
Unpacked unpack_fp16(Words8 pairs) { return {fp16_to_floats(pairs & 0xffff), fp16_to_floats(pairs >> 16)}; }

// c[16, 8] = a[16, 16] b[16, 8], with pairs of neighbours along the 16 that are summed over.
template <Unpacked (*kUnpack)(Words8)> void multiply(CollectiveBuffer& x) {
    Unpacked b[8];
    for (int k = 0; k < 8; ++k) b[k] = kUnpack(*reinterpret_cast<const Words8*>(x.b[k]));
    for (int row = 0; row < 16; ++row) {
        const Unpacked a = kUnpack(*reinterpret_cast<const Words8*>(x.a[row]));
        Floats8 even{}, odd{};
        for (int k = 0; k < 8; ++k) {
            even += a.lo[k] * b[k].lo;
            odd += a.hi[k] * b[k].hi;
        }
        *reinterpret_cast<Floats8*>(x.c[row]) = even + odd;
    }
}

}  // namespace

Regs4 ldmatrix_x4(const void* row, bool transpose) {
    Warp& w = *self->warp;
    const int lane = self->lane;
    check_row(transpose ? kLdmatrixTrans : kLdmatrix, row);
    counters.shared += 16;
    note_read(row, 16, __builtin_return_address(0));
    w.buffer.address[lane] = const_cast<void*>(row);
    if (arrive_last(w, transpose ? kLdmatrixTrans : kLdmatrix)) {
        if (transpose)
            load_matrices_transposed(w.buffer);
        else
            load_matrices(w.buffer);
        complete_collective(w);
    }
    return w.buffer.regs[lane];
}

void stmatrix_x4(void* row, Regs4 regs, bool transpose) {
    Warp& w = *self->warp;
    const int lane = self->lane;
    check_row(transpose ? kStmatrixTrans : kStmatrix, row);
    note_write(row, 16, __builtin_return_address(0));
    w.buffer.address[lane] = row;
    w.buffer.regs[lane] = regs;
    if (!arrive_last(w, transpose ? kStmatrixTrans : kStmatrix)) return;
    if (transpose)
        store_matrices_transposed(w.buffer);
    else
        store_matrices(w.buffer);
    complete_collective(w);
}

Acc4 mma_m16n8k16(Acc4 acc, Regs4 a, uint32_t b0, uint32_t b1, Element type) {
    Warp& w = *self->warp;
    CollectiveBuffer& x = w.buffer;
    const int g = self->lane / 4, c = self->lane % 4;
    x.a[g][c] = a.r[0];
    x.a[g + 8][c] = a.r[1];
    x.a[g][c + 4] = a.r[2];
    x.a[g + 8][c + 4] = a.r[3];
    x.b[c][g] = b0;
    x.b[c + 4][g] = b1;
    const bool is_bf16 = type == Element::kBFloat16;
    if (arrive_last(w, is_bf16 ? kMmaBf16 : kMmaFp16)) {
        ++counters.mma;
        if (is_bf16)
            multiply<unpack_bf16>(x);
        else
            multiply<unpack_fp16>(x);
        complete_collective(w);
    }
    for (int i = 0; i < 4; ++i) acc.x[i] += x.c[g + i / 2 * 8][2 * c + i % 2];
    return acc;
}

float shfl_xor(float value, int mask) {
    Warp& w = *self->warp;
    CollectiveBuffer& x = w.buffer;
    const int lane = self->lane;
    x.value[lane] = value;
    x.mask[lane] = mask;
    if (arrive_last(w, kShfl)) {
        for (int l = 0; l < kWarpLanes; ++l) x.exchanged[l] = x.value[(l ^ x.mask[l]) % kWarpLanes];
        complete_collective(w);
    }
    return x.exchanged[lane];
}

// Any lane may be elected.
bool elect_one() {
    Warp& w = *self->warp;
    if (arrive_last(w, kElect)) {
        w.buffer.elected = static_cast<int>(random_below(kWarpLanes));
        complete_collective(w);
    }
    return w.buffer.elected == self->lane;
}

}  // namespace sim
