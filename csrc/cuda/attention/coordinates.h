// Position of a register tile's elements in the score matrix, and per-query values. Rows are queries and columns are
// keys, or transposed.
#pragma once
#include "cuda/ptx/shared.h"
#include "cuda/tile/lane.h"
#include "policy/mask.h"

namespace flash_attn {

// queries() and keys(): ranges that contain all of a lane's elements, and possibly more.
//
// (row0, key0): query and key of the tile's first element.
struct QueryRows {
    static constexpr bool kByKey = false;  // a lane has few queries and many keys
    int row0, key0;
    FA_DEVICE static int first_column() { return lane_column(); }
    FA_DEVICE int query(int r, int) const { return row0 + lane_row(r); }
    FA_DEVICE int key(int, int column) const { return column + key0; }
    FA_DEVICE Range queries(int rows, int) const { return {row0, row0 + rows}; }
    FA_DEVICE Range keys(int, int columns) const { return {key0, key0 + columns}; }
};
class KeyRows {
public:
    static constexpr bool kByKey = true;  // a lane has few keys and many queries
    FA_DEVICE KeyRows(int row0, int key0) : row0(row0), lane_key_(key0 + int(fresh_lane_id() / 4)) {}
    FA_DEVICE static int first_column() { return int(fresh_lane_id() % 4 * 2); }
    FA_DEVICE int query(int, int column) const { return row0 + column; }
    FA_DEVICE int key(int r, int) const { return lane_key_ + r / 2 * 16 + r % 2 * 8; }
    FA_DEVICE Range queries(int, int columns) const { return {row0, row0 + columns}; }
    FA_DEVICE Range keys(int rows, int) const { return {lane_key_, lane_key_ + rows}; }

    const int row0;

private:
    int lane_key_;  // of the lane's first row
};

// One value per query (queries are rows), for the element in row r and column b of the 8 columns of the last select().
template <int kLaneRows> struct RowNumbers {
    float x[kLaneRows];
    FA_DEVICE void select(int) {}
    FA_DEVICE float operator()(int r, int) const { return x[r]; }
};
class ColumnNumbers {  // one fp32 value per query in shared memory; queries are columns
public:
    FA_DEVICE explicit ColumnNumbers(ptx::SmemPtr numbers) : lane_(ptx::pin(numbers + int(fresh_lane_id() % 4 * 8))) {}
    // The array at a byte offset that is known at compile time: shares the address register.
    FA_DEVICE ColumnNumbers(const ColumnNumbers& other, int bytes) : lane_(other.lane_ + bytes) {}
    FA_DEVICE void select(int n) { ptx::load_shared_8(pair_, lane_ + n * 32); }
    FA_DEVICE float operator()(int, int b) const { return ptx::bits_float(pair_[b]); }

private:
    ptx::SmemPtr lane_;
    uint32_t pair_[2];
};

}  // namespace flash_attn
