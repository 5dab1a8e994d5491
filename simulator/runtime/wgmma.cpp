// Products of a warpgroup: issued without blocking, performed in order once all four warps have issued them.
#include "runtime/element.h"
#include "runtime/runtime.h"

namespace sim {
namespace {

constexpr int kMaxN = 256, kDepth = 16;

// Addresses of the elements (mn, k) of a 16-deep slice, formed from the descriptor's fields as the hardware does: a
// linear address from start, leading and stride offsets, then the swizzle on the address bits.
struct Descriptor {
    uint32_t start, leading, stride;
    int swizzle_bytes;

    explicit Descriptor(uint64_t d)
        : start(static_cast<uint32_t>(d & 0x3fff) << 4), leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4) {
        constexpr int kSwizzle[4] = {0, 128, 64, 32};
        swizzle_bytes = kSwizzle[d >> 62];
        if (d >> 49 & 7) fail("wgmma: base_offset is not modelled");
        if (d & 0x3ff1c000c000c000ull) fail("wgmma: reserved descriptor bits are set");
    }
    uint32_t address(uint32_t mn, uint32_t k, bool mn_major) const {
        const uint32_t row = swizzle_bytes ? static_cast<uint32_t>(swizzle_bytes) : 16;  // one contiguous run, in bytes
        const uint32_t span = row / 2;                                                   // and in elements
        uint32_t a = start;
        if (!mn_major)
            a += mn / 8 * stride + mn % 8 * row + (swizzle_bytes ? k * 2 : k / 8 * leading + k % 8 * 2);
        else if (swizzle_bytes)
            a += mn % span * 2 + mn / span * leading + k % 8 * row + k / 8 * stride;
        else
            a += mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
        return swizzled(a, swizzle_bytes);
    }
};

// The 16-byte chunks of rows first ... first + rows of an operand, contiguous in k or in mn: f(chunk, mn, k).
template <class F> void for_each_chunk(const Block& b, uint64_t desc, int first, int rows, bool mn_major, F f) {
    const Descriptor d(desc);
    for (int x = 0; x < rows * kDepth / 8; ++x) {
        const int mn = first + (mn_major ? x / kDepth * 8 : x / 2), k = mn_major ? x % kDepth : x % 2 * 8;
        f(smem_at(b, d.address(uint32_t(mn), uint32_t(k), mn_major), 16), mn, k);
    }
}

float to_float(uint16_t bits, Element type) {
    return type == Element::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// out[mn][k]
void read_operand(const Block& b, uint64_t desc, int rows, bool mn_major, Element type, float (*out)[kDepth]) {
    for_each_chunk(b, desc, 0, rows, mn_major, [&](const char* chunk, int mn, int k) {
        uint16_t bits[8];
        copy_16(bits, chunk);
        for (int i = 0; i < 8; ++i) (mn_major ? out[mn + i][k] : out[mn][k + i]) = to_float(bits[i], type);
    });
}

// Each warp's quarter reads its rows of A and all of B from shared memory ...
void note_operands([[maybe_unused]] const Block& b, Warpgroup& g, [[maybe_unused]] const PendingWgmma& p, int slot,
                   int warp) {
    AsClock engine(g.smem_port[warp]);
    acquire(&g.issued_view[slot][warp]);
#ifdef SIM_TSAN
    auto note = [&](const char* chunk, int, int) { note_read(chunk, 16, p.pc); };
    if (!p.op.a_regs) for_each_chunk(b, p.op.desc_a, 16 * warp, 16, p.op.a_mn_major, note);
    for_each_chunk(b, p.op.desc_b, 0, p.op.n, p.op.b_mn_major, note);
#endif
    publish_completion(g.done[slot][warp]);
}
// ... and the registers of its threads, as the last wgmma.fence published them.
void read_a_registers(Warpgroup& g, const PendingWgmma& p, int warp, float (*a)[kDepth]) {
    AsClock engine(g.register_port[warp]);
    for (int t = 32 * warp; t < 32 * warp + 32; ++t) {
        acquire(p.register_fence[t]);
        if (!p.op.a_regs) continue;
        note_read(p.a_regs[t], 16, p.pc);
        for (int r = 0; r < 4; ++r)
            for (int h = 0; h < 2; ++h)
                a[t / 32 * 16 + t % 32 / 4 + r % 2 * 8][t % 4 * 2 + h + r / 2 * 8] =
                    to_float(static_cast<uint16_t>(p.a_regs[t][r] >> 16 * h), p.op.type);
    }
}
void write_accumulators(Warpgroup& g, const PendingWgmma& p, int slot, int warp, const float (*c)[kMaxN]) {
    AsClock engine(g.register_port[warp]);
    for (int t = 32 * warp; t < 32 * warp + 32; ++t) {
        note_write(p.acc[t], static_cast<size_t>(p.op.n) * 2, p.pc);
        const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
        for (int x = 0; x < p.op.n / 2; ++x) {
            float& d = p.acc[t][x];
            d = (p.op.accumulate ? d : 0) + c[row + x / 2 % 2 * 8][x / 4 * 8 + column + x % 2];
        }
    }
    release(&g.done[slot][warp].threads);  // registers are no business of the async view
}

// c[64][n] = a[64][16] b[n][16]^T
void multiply(int n, const float (*a)[kDepth], const float (*b)[kDepth], float (*c)[kMaxN]) {
    static float transposed[kDepth][kMaxN];
    for (int j = 0; j < n; ++j)
        for (int k = 0; k < kDepth; ++k) transposed[k][j] = b[j][k];
    for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < n; ++j) c[i][j] = 0;
        for (int k = 0; k < kDepth; ++k)
            for (int j = 0; j < n; ++j) c[i][j] += a[i][k] * transposed[k][j];
    }
}

// The warpgroup of the running thread. The first one of a block makes them all.
Warpgroup& my_warpgroup() {
    Block& b = *self->block;
    if (b.num_warps % 4) fail("wgmma in a block of %d warps: not whole warpgroups", b.num_warps);
    const size_t count = static_cast<size_t>(b.num_warps / 4), index = static_cast<size_t>(self->warp->index / 4);
    use_async_proxy(b);
    AsScheduler as;
    while (b.warpgroups.size() < count) {
        auto* g = new Warpgroup{};
        for (int w = 0; w < 4; ++w) {
            g->smem_port[w] = create_clock("wgmma shared memory port");
            g->register_port[w] = create_clock("wgmma register port");
        }
        b.warpgroups.push_back(g);
    }
    Warpgroup& g = *b.warpgroups[index];
    if (g.issued == 0)
        for (int w = 0; w < 4; ++w)
            for (Clock port : {g.smem_port[w], g.register_port[w]}) {
                AsClock as_port(port);
                acquire(&b.boundary[b.phase]);
            }
    return g;
}

// Where the running thread's next product is put together with those of the other 127 threads.
PendingWgmma& join(Warpgroup& g, const Wgmma& op, const void* pc) {
    const uint64_t number = self->proxy.wgmma_issued++;
    PendingWgmma& p = g.ops[number % kMaxWgmmaInFlight];
    if (number == g.issued) {
        if (number - g.performed == kMaxWgmmaInFlight) fail("more than %d wgmma in flight", kMaxWgmmaInFlight);
        ++g.issued;
        p.op = op;
        p.pc = pc;
        p.arrived = 0;
    }
    const Wgmma& first = p.op;
    if (first.desc_a != op.desc_a || first.desc_b != op.desc_b || first.n != op.n || first.type != op.type ||
        first.accumulate != op.accumulate || !first.a_regs != !op.a_regs)
        fail("wgmma: the warps of a warpgroup disagree on a descriptor, a shape or scale-d");
    return p;
}

}  // namespace

void perform_wgmma(Block& block, Warpgroup& g, PendingWgmma& p, int slot) {
    static float a[64][kDepth], b[kMaxN][kDepth], c[64][kMaxN];
    for (int w = 0; w < 4; ++w) note_operands(block, g, p, slot, w);
    if (!p.op.a_regs) read_operand(block, p.op.desc_a, 64, p.op.a_mn_major, p.op.type, a);
    read_operand(block, p.op.desc_b, p.op.n, p.op.b_mn_major, p.op.type, b);
    for (int w = 0; w < 4; ++w) read_a_registers(g, p, w, a);
    multiply(p.op.n, a, b, c);
    for (int w = 0; w < 4; ++w) write_accumulators(g, p, slot, w, c);
}

void wgmma(const Wgmma& op) {
    Warpgroup& g = my_warpgroup();
    ProxyState& mine = self->proxy;
    if (!mine.register_fences) fail("wgmma: no wgmma.fence before the first one");
    if (op.n < 8 || op.n > kMaxN || op.n % 8) fail("wgmma: n = %d", op.n);
    const int slot = static_cast<int>(mine.wgmma_issued % kMaxWgmmaInFlight), thread = self->index % 128;
    PendingWgmma& p = join(g, op, __builtin_return_address(0));
    p.acc[thread] = op.acc;
    p.a_regs[thread] = op.a_regs;
    p.register_fence[thread] = &mine.register_fence[mine.register_fences % 8];
    {
        AsClock view(self->warp->async_view);
        release(&g.issued_view[slot][self->warp->index % 4]);
    }
    ++p.arrived;
    perform_early();
}

void wgmma_fence() {
    ProxyState& mine = self->proxy;
    release(&mine.register_fence[++mine.register_fences % 8]);
}

void wgmma_commit() {
    ProxyState& mine = self->proxy;
    mine.wgmma_group_end[mine.wgmma_groups++ % 64] = mine.wgmma_issued;
}

void wgmma_wait(int pending) {
    const ProxyState& mine = self->proxy;
    if (mine.wgmma_groups <= static_cast<uint64_t>(pending)) return;
    const uint64_t target = mine.wgmma_group_end[(mine.wgmma_groups - 1 - static_cast<uint64_t>(pending)) % 64];
    if (!target) return;
    Warpgroup& g = my_warpgroup();
    while (g.performed < target) block_while_equal(g.performed, g.performed, "wgmma.wait_group", &g);
    absorb(g.done[(target - 1) % kMaxWgmmaInFlight][self->warp->index % 4]);
}

}  // namespace sim
