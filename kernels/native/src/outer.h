// The register tile of weight gradients: outer products, [rows] times [columns] of each pixel, summed in registers.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

// Left operand: row i of pixel m lies at left[m * left_step + i]. Right operand: lines of VL columns, line j of pixel m at
// right[j * right_step + m * VL]. Steps are odd numbers of cache lines, so that one pixel's lines spread over the sets of
// the first-level cache when they are written.
struct Outer {
  const float* left;
  int64_t left_step;
  const float* right;
  int64_t right_step;
  int64_t pixels;
  float* sums;  // [rows][columns]
  int64_t stride;  // from row to row of `sums`
  int columns;     // valid ones of vectors * VL
  bool add;        // to what is in `sums`
};

static inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, VL) | 1) * VL; }

template <int ROWS, int VECTORS> static void outer(const Outer& t) {
  vec sum[ROWS][VECTORS] = {};
  const float *a = t.left, *b = t.right;
  for (int64_t m = 0; m < t.pixels; m++, a += t.left_step, b += VL) {
    vec right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) right[j] = load(b + j * t.right_step);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const vec unit = splat(a[i]), left = VECTORS > 1 ? in_register(unit) : unit;
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
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
  static constexpr Outers outers;
  outers.table[rows - 1][t.columns > VL](t);
}

}  // namespace RF_VARIANT
