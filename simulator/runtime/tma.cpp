// Data movement of TMA and bulk operations.
#include "runtime/runtime.h"

namespace sim {

// Bits of the 16-byte chunk ^= bits of the 128-byte line.
uint32_t swizzled(uint32_t address, int swizzle_bytes) {
    return swizzle_bytes ? address ^ (address >> 3 & static_cast<uint32_t>(swizzle_bytes - 1) & 0x70) : address;
}

namespace {

// A kernel's operand, copied without a library call, which ThreadSanitizer would take for an access of its own.
template <class T> void copy_operand(T& to, const T& from) {
    static_assert(sizeof(T) % 4 == 0);
    using Word = uint32_t __attribute__((may_alias));
    for (size_t i = 0; i < sizeof(T) / 4; ++i)
        reinterpret_cast<volatile Word*>(&to)[i] = reinterpret_cast<const volatile Word*>(&from)[i];
}

int box_bytes(const TensorMap& map) {
    int bytes = map.element_bytes;
    for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
    return bytes;
}

void check_box(const TensorMap& map, const void* smem, int rank) {
    const int row_bytes = map.box[0] * map.element_bytes;
    if (map.rank != rank) fail("TMA: instruction of rank %d on a tensor map of rank %d", rank, map.rank);
    if (smem_address(smem) % 128)
        fail("TMA: shared address smem+%td is not 128-byte aligned", (const char*)smem - sim::smem());
    if (row_bytes % 16 || (map.swizzle_bytes && row_bytes > map.swizzle_bytes))
        fail("TMA: box rows of %d bytes do not fit the swizzle", row_bytes);
    if (reinterpret_cast<uintptr_t>(map.base) % 16) fail("TMA: global address is not 16-byte aligned");
    for (int d = 0; d < map.rank; ++d)
        if (map.box[d] > 256 || (d && map.stride_bytes[d] % 16)) fail("TMA: box or stride of dimension %d", d);
}

// f(offset in the box, start of the row in global memory, first and last byte of the row that the tensor has).
template <class F> void for_each_row(const AsyncCopy& copy, F f) {
    const TensorMap& map = copy.map;
    const int row_bytes = map.box[0] * map.element_bytes, rows = copy.bytes / row_bytes;
    for (int row = 0; row < rows; ++row) {
        bool inside = true;
        // Addresses wrap around, which cuda/tile/copy_sm90.h makes use of.
        uint64_t address = reinterpret_cast<uintptr_t>(map.base) + uint64_t(int64_t{copy.coord[0]} * map.element_bytes);
        for (int d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
            const int64_t x = copy.coord[d] + rest % map.box[d];
            inside &= x >= 0 && x < map.dim[d];
            address += uint64_t(x) * uint64_t(map.stride_bytes[d]);
        }
        auto clamped = [&](int64_t x) { return static_cast<int>(x < 0 ? 0 : x > map.box[0] ? map.box[0] : x); };
        const int first = clamped(-int64_t{copy.coord[0]}), last = clamped(map.dim[0] - copy.coord[0]);
        f(row * row_bytes, reinterpret_cast<char*>(address), first * map.element_bytes,
          inside && last > first ? last * map.element_bytes : first * map.element_bytes);
    }
}

char* chunk_at(const Block& b, const AsyncCopy& copy, int offset) {
    return smem_at(b, swizzled(copy.smem_address + static_cast<uint32_t>(offset), copy.map.swizzle_bytes), 16);
}

void load_box(Block& b, const AsyncCopy& copy) {
    const int row_bytes = copy.map.box[0] * copy.map.element_bytes;
    for_each_row(copy, [&](int offset, const char* global, int first, int last) {
        if (last > first) note_read(global + first, static_cast<size_t>(last - first), copy.pc);
        counters.tma.read += last - first;
        for (int byte = 0; byte < row_bytes; byte += 16) {
            char* chunk = chunk_at(b, copy, offset + byte);
            note_write(chunk, 16, copy.pc);
            for (int i = byte; i < byte + 16; ++i) chunk[i - byte] = i >= first && i < last ? global[i] : 0;
        }
    });
}

// Whole chunks of 16 bytes, also where the row of the tensor ends within one: triton-lang/triton issue 11583.
void store_box(const AsyncCopy& copy) {
    for_each_row(copy, [&](int offset, char* global, int first, int last) {
        last = (last + 15) / 16 * 16;
        if (last > first) note_write(global + first, static_cast<size_t>(last - first), copy.pc);
        counters.tma.written += last - first;
        for (int i = first; i < last; ++i) global[i] = copy.data[static_cast<size_t>(offset + i)];
    });
}

void issue_box(AsyncCopy::Kind kind, const void* smem, const TensorMap& map, uint64_t* bar, const int* coord, int rank,
               const void* pc) {
    check_box(map, smem, rank);
    AsyncCopy& copy = issue_copy(kind, smem, box_bytes(map), pc);
    copy.bar = bar;
    copy_operand(copy.map, map);
    for (int i = 0; i < rank; ++i) copy_operand(copy.coord[i], coord[i]);
    perform_early();
}

void issue_bulk(AsyncCopy::Kind kind, const char* what, const void* smem, void* global, int bytes, uint64_t* bar,
                const void* pc) {
    if (smem_address(smem) % 16 || bytes <= 0 || bytes % 16)
        fail("%s: shared address and size must be multiples of 16", what);
    check_global(what, global, bytes, 16);
    AsyncCopy& copy = issue_copy(kind, smem, bytes, pc);
    copy.bar = bar;
    copy.global = static_cast<char*>(global);
    perform_early();
}

}  // namespace

void perform_load(Block& b, AsyncCopy& copy) {
    if (copy.kind == AsyncCopy::kTmaLoad) return load_box(b, copy);
    counters.bulk.read += copy.bytes;
    for (int i = 0; i < copy.bytes; i += 16) {
        char* to = smem_at(b, copy.smem_address, copy.bytes) + i;
        note_read(copy.global + i, 16, copy.pc);
        note_write(to, 16, copy.pc);
        copy_16(to, copy.global + i);
    }
}

void read_for_store(Block& b, AsyncCopy& copy) {
    for (int i = 0; i < copy.bytes; i += 16) {
        const char* chunk = chunk_at(b, copy, i);  // without a tensor map: not swizzled
        note_read(chunk, 16, copy.pc);
        copy_16(&copy.data[static_cast<size_t>(i)], chunk);
    }
}

void write_store(AsyncCopy& copy) {
    if (copy.kind == AsyncCopy::kTmaStore) return store_box(copy);
    counters.bulk.added += copy.bytes;
    using Float = float __attribute__((may_alias));
    auto* to = reinterpret_cast<Float*>(copy.global);
    const auto* from = reinterpret_cast<const Float*>(copy.data.data());
    for (int i = 0; i < copy.bytes / 4; ++i) {
        options.ordered_reds ? note_write(to + i, 4, copy.pc) : note_atomic(to + i);
        to[i] += from[i];
    }
}

void tma_load(void* smem_dst, const TensorMap& map, uint64_t* bar, const int* coord, int rank) {
    issue_box(AsyncCopy::kTmaLoad, smem_dst, map, bar, coord, rank, __builtin_return_address(0));
}
// A hint for the cache: nothing to model.
void tma_prefetch(const TensorMap& map, const int*, int rank) {
    if (map.rank != rank) fail("TMA prefetch: instruction of rank %d on a tensor map of rank %d", rank, map.rank);
}
void tma_store(const TensorMap& map, const void* smem_src, const int* coord, int rank) {
    for (int i = 0; i < rank; ++i)
        if (coord[i] < 0) fail("TMA store: coordinate %d is %d, and must not be negative", i, coord[i]);
    issue_box(AsyncCopy::kTmaStore, smem_src, map, nullptr, coord, rank, __builtin_return_address(0));
}
void bulk_load(void* smem_dst, const void* global_src, int bytes, uint64_t* bar) {
    issue_bulk(AsyncCopy::kBulkLoad, "cp.async.bulk", smem_dst, const_cast<void*>(global_src), bytes, bar,
               __builtin_return_address(0));
}
void bulk_reduce_add(float* global_dst, const float* smem_src, int bytes) {
    issue_bulk(AsyncCopy::kBulkReduce, "cp.reduce.async.bulk", smem_src, global_dst, bytes, nullptr,
               __builtin_return_address(0));
}

}  // namespace sim
