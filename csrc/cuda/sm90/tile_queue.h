// Which tiles a block works on. Blocks stay until there are no tiles left. The thread that loads takes one after
// another when it has asked for all that the last one needs, and announces it to the warps that compute.
// Not earlier: a tile that is taken while much is left to do would wait, and other blocks run out of work.
#pragma once
#include <type_traits>
#include "cuda/ptx/global.h"
#include "cuda/tile/pipeline.h"
#include "policy/tile_order.h"

namespace flash_attn {

// How the blocks of a kernel divide its tiles. The first ones go to the blocks in order.
struct TileShares {
    TileOrder order;
    int num_blocks;
    int32_t* taken;  // how many of the others have been taken; null: of every num_blocks tiles each block has one

    FA_DEVICE static int64_t first() { return ptx::block_idx(); }
    FA_DEVICE int64_t after(int64_t i) const { return num_blocks + (taken ? ptx::fetch_add(taken, 1) : i); }
    FA_DEVICE bool has(int64_t i) const { return i < order.grid.num_blocks(); }
};

// A tile as it is announced, with all that has been computed of it, and two barriers: one completes when it is there,
// the other when every warp has read it. Tile: with is_end(), which is true of what comes after the last one.
struct TileQueueSm90 {
    static constexpr int kChunks = 4, kWords = 4 * kChunks, kBytes = 16 * kChunks + Pipeline<1>::kBytes;
    ptx::SmemPtr base;  // a multiple of 16

    FA_DEVICE ptx::SmemPtr end() const { return base + kBytes; }
    FA_DEVICE void init(int readers) const { pipe().init(readers); }

    // The loading thread.
    template <class Tile> FA_DEVICE void announce(Pipeline<1>::Index& at, const Tile& tile) const {
        static_assert(std::is_trivially_copyable_v<Tile> && sizeof(Tile) <= 4 * kWords);
        uint32_t words[kWords] = {};
        __builtin_memcpy(words, &tile, sizeof tile);
        pipe().wait_until_free(at);
#pragma unroll
        for (int i = 0; i < kWords; i += 4)
            ptx::store_shared_16(base + 4 * i, {words[i], words[i + 1], words[i + 2], words[i + 3]});
        ptx::mbarrier_arrive(pipe().full(0));
        at.advance();
    }
    // A warp that was counted: f(tile) for every one.
    template <class Tile, class F> FA_DEVICE void for_each(F f) const {
        Pipeline<1>::Index at;
        for (Tile tile = read<Tile>(at); !tile.is_end(); tile = read<Tile>(at)) f(tile);
    }

private:
    FA_DEVICE Pipeline<1> pipe() const { return {base + 16 * kChunks}; }
    template <class Tile> FA_DEVICE Tile read(Pipeline<1>::Index& at) const {
        pipe().wait(at);
        uint32_t words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint32_t chunk[4];
            ptx::load_shared_16(chunk, base + 4 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) words[i + j] = uint32_t(ptx::uniform(int(chunk[j])));
        }
        ptx::sync_warp();  // before one lane releases what all have read
        if (lane_id() == 0) pipe().release(at);
        at.advance();
        Tile tile;
        __builtin_memcpy(&tile, words, sizeof tile);
        return tile;
    }
};

}  // namespace flash_attn
