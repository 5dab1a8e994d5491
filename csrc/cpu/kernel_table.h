// The interface of each instruction set to backend.cpp: one table of functions per element type.
#pragma once
#include <cstddef>
#include <cstdint>
#include "policy/seqlen.h"
#include "problem.h"

namespace flash_attn::cpu {

// Queries of one forward task, and keys of one step of it. Speed is flat between 64 and 256.
constexpr int kQueryTile = 128, kKeyTile = 128;
// A tile of cpu/decode.h has at most kDecodeRows rows; a task, kDecodeTiles tiles and kDecodeTaskRows rows in all.
constexpr int kDecodeRows = 16, kDecodeTiles = 8, kDecodeTaskRows = 64;

// Whether a sequence has so few queries that cpu/decode.h computes them, and the backward pass their scores, by the
// same dot products: gradients need the weights that the output was made of. Dropout blocks are of one head.
inline bool has_few_rows(const Problem& p, const Sequence& seq) {
    return !p.dropout.threshold && int64_t(seq.seqlen_q) * (p.num_heads / p.num_heads_k) <= kDecodeRows;
}

// One forward task: a tile of rows, and a chunk of the keys that they see. A tile has `heads` heads from `first_head`
// on, which share a key head; its row r is query first_query + r / heads of head first_head + r % heads.
struct FwdTask {
    int batch, first_head, heads, first_query, num_queries;
    int key_begin, key_end;
    bool decodes;            // the tiles are those of cpu/decode.h, not of cpu/fwd.h
    int num_tiles;           // this tile, and those of the next key heads
    void* partial;           // its part of the result (cpu/merge.h); null: the chunk has all keys, the result is final
    int64_t partial_stride;  // bytes from the partial result of one tile to that of the next
};

// A tile of a task, alone.
inline FwdTask tile_of(FwdTask task, int i) {
    task.first_head += i * task.heads;
    if (task.partial) task.partial = static_cast<char*>(task.partial) + i * task.partial_stride;
    task.num_tiles = 1;
    return task;
}

// The partial results of one tile, in the order of their chunks.
struct MergeTask {
    FwdTask tile;
    int num_chunks;
    void* partials;  // [num_chunks], each of partial_bytes
};

// Backward tasks of one sequence and key head are split over keys: split s of num_splits owns key tiles s, s +
// num_splits, ...; each split accumulates a dQ of its own, and these are summed in a fixed order.
struct BwdTask {
    int batch, head_k, split, num_splits;
    void* dq_accum;  // [num_splits, num_heads, seqlen_q, head_dim_padded], fp32 or fp64
};

struct Kernels {
    int compute_bytes;                        // size of the type of scores and accumulators
    int (*head_dim_padded)(int head_dim);     // row length of dq_accum
    size_t (*fwd_scratch)(const FwdParams&);  // bytes per thread
    void (*fwd)(const FwdParams&, const FwdTask&, void* scratch);
    size_t (*partial_bytes)(const FwdParams&, int num_rows);
    void (*merge)(const FwdParams&, const MergeTask&);
    void (*append)(const AppendParams&, int batch, int row);  // a new row of k and v, and a row of q, of all heads
    size_t (*bwd_preprocess_scratch)(const BwdParams&);
    void (*bwd_preprocess)(const BwdParams&, int batch, int head, void* scratch);
    size_t (*bwd_scratch)(const BwdParams&);  // bytes per thread
    void (*bwd)(const BwdParams&, const BwdTask&, void* scratch);
    void (*bwd_postprocess)(const BwdParams&, const BwdTask&, int head);  // dQ of one head from dq_accum
    void (*attn_probs)(const ProbsParams&, int batch, int head);
};

namespace base { Kernels kernels(ElementType type); }
namespace avx2 { Kernels kernels(ElementType type); }
namespace avx512 { Kernels kernels(ElementType type); }
namespace avx512_bf16 { Kernels kernels(ElementType type); }

}  // namespace flash_attn::cpu
