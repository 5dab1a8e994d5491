// Dynamic tile scheduling for persistent blocks. The producer thread takes the next tile after it has issued all loads
// of the current one, and announces it to the consumer warps. It does not take tiles earlier: they would wait while
// other blocks run out of work.
#pragma once
#include <type_traits>
#include "cuda/ptx/global.h"
#include "cuda/tile/pipeline.h"
#include "policy/tile_order.h"

namespace flash_attn {

// How the blocks of a kernel share its tiles. Block i starts with tile i.
struct TileShares {
    TileOrder order;
    int num_blocks;
    int32_t* taken;  // counter of the dynamically taken tiles; null: static, block i gets tiles i, i + num_blocks, ...

    FA_DEVICE static int64_t first() { return ptx::block_idx(); }
    FA_DEVICE int64_t after(int64_t i) const { return num_blocks + (taken ? ptx::fetch_add(taken, 1) : i); }
    FA_DEVICE bool has(int64_t i) const { return i < order.grid.num_blocks(); }
};

// A one-stage pipeline for announced tiles: `full` completes when the tile has been written, `empty` when every warp
// has read it. Tile: trivially copyable, with is_end(), true for the item after the last tile.
struct TileQueueSm90 {
    static constexpr int kChunks = 5, kWords = 4 * kChunks, kBytes = 16 * kChunks + Pipeline<1>::kBytes;
    ptx::SmemPtr base;  // 16-byte aligned

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }
    FA_DEVICE void init(int readers) const { pipe().init(readers); }

    // Called by the producer thread.
    template <class Tile> FA_DEVICE void announce(Pipeline<1>::Index& at, const Tile& tile) const {
        static_assert(std::is_trivially_copyable_v<Tile> && sizeof(Tile) <= 4 * kWords);
        uint32_t words[kWords] = {};
        __builtin_memcpy(words, &tile, sizeof tile);
        pipe().wait_until_free(at);  // every warp has read the previous tile
#pragma unroll
        for (int i = 0; i < kWords; i += 4)
            ptx::store_shared_16(base + 4 * i, {words[i], words[i + 1], words[i + 2], words[i + 3]});
        ptx::mbarrier_arrive(pipe().full(0));
        at.advance();
    }
    // Called by each warp counted in init(): f(tile) for every tile.
    template <class Tile, class F> FA_DEVICE void for_each(F f) const {
        Pipeline<1>::Index at;
        for (Tile tile = read<Tile>(at); !tile.is_end(); tile = read<Tile>(at)) f(tile);
    }

private:
    FA_DEVICE Pipeline<1> pipe() const { return {base + 16 * kChunks}; }
    template <class Tile> FA_DEVICE Tile read(Pipeline<1>::Index& at) const {
        pipe().wait(at);  // the tile has been written
        uint32_t words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint32_t chunk[4];
            ptx::load_shared_16(chunk, base + 4 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) words[i + j] = uint32_t(ptx::uniform(int(chunk[j])));
        }
        ptx::sync_warp();  // all lanes have read before one lane releases
        if (lane_id() == 0) pipe().release(at);
        at.advance();
        Tile tile;
        __builtin_memcpy(&tile, words, sizeof tile);
        return tile;
    }
};

}  // namespace flash_attn
