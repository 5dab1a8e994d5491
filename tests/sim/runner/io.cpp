#include "runner/io.h"
#include <algorithm>
#include "cuda/sm80/config.h"
#include "cuda/sm90/config.h"

namespace flash_attn::runner {
namespace {

constexpr int64_t kElementBytes = 2, kFloatBytes = 4;

struct TileShape {
    int rows, keys;
    int head_dim;  // of the kernel: what is asked for, rounded up
};

template <class Config> TileShape shape() { return {Config::kBlockM, Config::kBlockN, Config::kHeadDim}; }

bool modifies_scores(const Case& c) { return c.softcap > 0 || !c.alibi.empty() || c.dropout_p > 0; }

template <class Tiles> TileShape shape_of(const Case& c) {
    if (c.smem < kLargeSmemBytes) return shape<typename Tiles::Small>();
    return modifies_scores(c) ? shape<typename Tiles::LargeModified>() : shape<typename Tiles::Large>();
}

template <class Tiles> TileShape hopper_shape_of(const Case& c) {
    return modifies_scores(c) ? shape<typename Tiles::Modified>() : shape<typename Tiles::Plain>();
}
template <class Tiles> TileShape hopper_fwd_shape_of(const Inputs& x) {
    const bool is_short = !modifies_scores(x.c) && prefers_short<Tiles>(x.problem());
    return is_short ? shape<typename Tiles::Short>() : hopper_shape_of<Tiles>(x.c);
}
template <int kHeadDim> TileShape hopper_fwd_shape(const Inputs& x) {
    if constexpr (kHeadDim == 192)
        if (x.c.head_dim_v <= 128) return hopper_fwd_shape_of<FwdTilesSm90<bf16, 192, 128>>(x);
    return hopper_fwd_shape_of<FwdTilesSm90<bf16, kHeadDim, kHeadDim>>(x);
}

// The tiles of the first head_dim that is large enough.
template <class F> TileShape by_head_dim(const Case& c, F tiles) {
    const int head_dim = std::max(c.head_dim, c.head_dim_v);
    if (head_dim <= 64) return tiles.template operator()<64>();
    if (head_dim <= 96) return tiles.template operator()<96>();
    if (head_dim <= 128) return tiles.template operator()<128>();
    if (head_dim <= 192) return tiles.template operator()<192>();
    return tiles.template operator()<256>();
}

// Whether any query of a tile sees any key of a tile: other pairs of tiles are passed over.
bool seen(const Case& c, const Sequence& s, const TileShape& t, int row0, int key0) {
    for (int i = row0; i < std::min(row0 + t.rows, s.seqlen_q); ++i)
        for (int j = key0; j < std::min(key0 + t.keys, s.seqlen_k); ++j)
            if (visible(c, s, i, j)) return true;
    return false;
}

// f(number of queries or keys in the tile, first of them) for every tile of a sequence.
template <class F> void for_each_tile(int length, int size, F f) {
    for (int first = 0; first < length; first += size) f(int64_t(std::min(size, length - first)), first);
}

}  // namespace

Traffic forward_traffic(const Inputs& x, bool hopper) {
    const Case& c = x.c;
    const TileShape t = by_head_dim(c, [&]<int kHeadDim>() {
        return hopper ? hopper_fwd_shape<kHeadDim>(x) : shape_of<FwdTilesSm80<bf16, kHeadDim>>(c);
    });
    Traffic bytes;
    for (const Sequence& s : sequences(c))
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
            int64_t keys = 0;
            for_each_tile(s.seqlen_k, t.keys, [&](int64_t count, int key0) {
                if (seen(c, s, t, row0, key0)) keys += count;
            });
            // Each tile of queries reads itself once, unless it sees nothing, and all keys and values of the tiles of
            // keys that it sees.
            if (keys) bytes.read += c.num_heads * rows * c.head_dim * kElementBytes;
            bytes.read += c.num_heads * keys * (c.head_dim + c.head_dim_v) * kElementBytes;
            bytes.written += c.num_heads * rows * (c.head_dim_v * kElementBytes + kFloatBytes);  // out, softmax_lse
        });
    return bytes;
}

Traffic backward_traffic(const Inputs& x, bool hopper) {
    const Case& c = x.c;
    const TileShape t = by_head_dim(c, [&]<int kHeadDim>() {
        return hopper ? hopper_shape_of<BwdTilesSm90<bf16, kHeadDim>>(c) : shape_of<BwdTilesSm80<bf16, kHeadDim>>(c);
    });
    // On Hopper, consumers that own columns have a counter each for every tile of dQ, and two numbers per query are
    // written once more, for whole tiles, which the main kernel then reads.
    const int64_t dims = c.head_dim + c.head_dim_v, dq_tile_bytes = t.rows * t.head_dim * kFloatBytes;
    const int64_t turns = !hopper || t.head_dim <= 128 ? 1 : t.head_dim == 192 ? 3 : 2;
    const int64_t padded_bytes = hopper ? 2 * t.rows * kFloatBytes : 0;
    Traffic bytes;
    for (const Sequence& s : sequences(c)) {
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int) {
            // Before: out, dout, softmax_lse and dlse give dsoftmax_sum; the tile of dQ and its counters are cleared.
            bytes.read += c.num_heads * rows * (2 * c.head_dim_v * kElementBytes + kFloatBytes);
            bytes.read += c.lse_grad ? c.num_heads * rows * kFloatBytes : 0;
            bytes.written += c.num_heads * (rows * kFloatBytes + dq_tile_bytes + turns * kFloatBytes + padded_bytes);
            // After: dQ.
            bytes.read += c.num_heads * dq_tile_bytes;
            bytes.written += c.num_heads * rows * c.head_dim * kElementBytes;
        });
        for_each_tile(s.seqlen_k, t.keys, [&](int64_t keys, int key0) {
            int64_t rows_seen = 0, tiles_seen = 0;
            for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
                if (seen(c, s, t, row0, key0)) rows_seen += rows, ++tiles_seen;
            });
            // A tile of keys is read once per head of keys, unless nothing sees it; q, dout, softmax_lse and
            // dsoftmax_sum once per head of queries and tile of keys that they see.
            if (tiles_seen) bytes.read += c.num_heads_k * keys * dims * kElementBytes;
            bytes.read += c.num_heads * rows_seen * dims * kElementBytes;
            bytes.read += c.num_heads * (hopper ? tiles_seen * padded_bytes : rows_seen * 2 * kFloatBytes);
            bytes.added += c.num_heads * tiles_seen * t.rows * t.head_dim * kFloatBytes;
            bytes.written += c.num_heads_k * keys * dims * kElementBytes;  // dK and dV
        });
    }
    return bytes;
}

Traffic probs_traffic(const Inputs& x) {
    const Case& c = x.c;
    const TileShape t = by_head_dim(c, [&]<int kHeadDim>() {
        using Config = typename FwdTilesSm80<bf16, kHeadDim>::Small;
        return TileShape{Config::kBlockM, Config::kBlockN, kHeadDim};
    });
    Traffic bytes;
    for (const Sequence& s : sequences(c))
        for_each_tile(s.seqlen_q, t.rows, [&](int64_t rows, int row0) {
            int64_t keys = 0;
            for_each_tile(s.seqlen_k, t.keys, [&](int64_t count, int key0) {
                if (seen(c, s, t, row0, key0)) keys += count;
            });
            // Each of the four lanes that share a row reads its softmax_lse.
            bytes.read += c.num_heads * rows * 4 * kFloatBytes;
            bytes.read += c.num_heads * ((keys ? rows : 0) + keys) * c.head_dim * kElementBytes;
            bytes.written += c.num_heads * rows * keys * kElementBytes;
        });
    return bytes;
}

}  // namespace flash_attn::runner
