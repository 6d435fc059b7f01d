// The register tile of weight gradients: outer products, [rows] times [columns] of each pixel, summed in registers.
#pragma once

#include "simd.h"
#include "work_sharing.h"

namespace RF_VARIANT {

// Memory that will be read next, to be fetched while what is in the caches is multiplied. Copying alone, one core waits
// for memory most of the time.
struct Next {
  const float *from, *end;

  // What `units` of `all` (pixels or tiles, in reading order) see of images, about.
  static Next of(const float* images, int64_t floats, Range units, int64_t all) {
    return {images + floats * units.begin / all, images + floats * units.end / all};
  }
  Next part(int64_t i, int64_t parts) const {
    const Range floats = share(end - from, i, parts);
    return {from + floats.begin, from + floats.end};
  }
};

// The next chunk's part of both images: the tiles take turns.
struct NextChunk {
  Next dy, x;

  Next part(int64_t tile, int64_t tiles) const { return (tile % 2 ? x : dy).part(tile / 2, (tiles + 1) / 2); }
};

// Left operand: blocks of rows, [pixels][BLOCK] each, so that a tile's lie close together; right operand: lines of VL
// columns, [pixels][VL] each. From line to line it is an odd number of cache lines, so that what is written for one
// pixel spreads over the sets of the first-level cache.
constexpr int BLOCK = 4 * VL;

struct Outer {
  const float* left;
  const float* right;
  int64_t right_step;
  int64_t pixels;
  float* sums;  // [rows][columns]
  int64_t stride;  // from row to row of `sums`
  int columns;     // valid ones of vectors * VL
  bool add;        // to what is in `sums`
  Next next;       // of it, at most a cache line for each pixel
};

// The register tiles of `rows` rows: as many as whole blocks have. Those that a short last block needs not are empty.
struct BlockTiles {
  static constexpr int64_t EACH = (BLOCK + MR - 1) / MR;  // of a block
  int64_t rows;

  int64_t blocks() const { return ceil_div(rows, BLOCK); }
  int64_t count() const { return blocks() * EACH; }
  Range operator[](int64_t tile) const {
    const int64_t first = tile / EACH * BLOCK, i = tile % EACH;
    const Tiles tiles{smaller<int64_t>(BLOCK, rows - first)};
    return i < tiles.count() ? Range{first + tiles.begin(i), first + tiles.begin(i + 1)} : Range{0, 0};
  }
};

// Where row `row` of the first pixel lies in a left operand for up to `pixels` pixels.
static inline int64_t left_offset(int64_t row, int64_t pixels) { return row / BLOCK * pixels * BLOCK + row % BLOCK; }

// Puts all rows of a pixel there.
static inline void put_left(float* left, int64_t pixel, int64_t pixels, const float* from, int64_t rows) {
  for (int64_t row = 0; row < rows; row += BLOCK) {
    const int64_t count = smaller<int64_t>(BLOCK, rows - row);
    memcpy(left + left_offset(row, pixels) + pixel * BLOCK, from + row, count * sizeof *from);
  }
}

static inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, VL) | 1) * VL; }

template <int ROWS, int VECTORS> static void outer(const Outer& t) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) __builtin_prefetch(t.sums + i * t.stride + j * VL, 1);
  vec sum[ROWS][VECTORS] = {};
  const float *a = t.left, *b = t.right, *next = t.next.from;
  for (int64_t m = 0; m < t.pixels; m++, a += BLOCK, b += VL) {
    if (next < t.next.end) {
      __builtin_prefetch(next, 0, 2);
      next += LINE;
    }
    vec right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) right[j] = load(b + j * t.right_step);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const vec unit = splat(a[i]), left = VECTORS > 1 ? in_register(unit) : unit;
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sum[i][j] = multiply_add(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      float* to = t.sums + i * t.stride + j * VL;
      const int count = t.columns - j * VL;
      store_some<Float32>(to, t.add ? load_some<Float32>(to, count) + sum[i][j] : sum[i][j], count);
    }
}

struct Outers {
  void (*table[MR][NV])(const Outer&) = {};
  constexpr Outers() { fill<MR>(); }
  template <int ROWS> constexpr void fill() {
    table[ROWS - 1][0] = outer<ROWS, 1>;
    table[ROWS - 1][1] = outer<ROWS, 2>;
    if constexpr (ROWS > 1) fill<ROWS - 1>();
  }
};

// rows: 1 to MR; the vectors are those that t.columns needs.
static inline void outer(const Outer& t, int rows) {
  static const Outers outers;  // a constant, though clang does not see it in time to believe it
  outers.table[rows - 1][t.columns > VL](t);
}

}  // namespace RF_VARIANT
