// The register tile: [rows x K] times [K x NR], accumulated in registers, then scale-shift-residual-ReLU and stored.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

// Left operand, a "panel": [ceil(K / VL)][rows][VL], zeros not needed after K. A vector copy fills a line of it, one
// pointer walks through it, and no two rows of a tile share a cache set, whatever the stride of the image.
// Right operand: [K][vectors * VL].
struct Tile {
  const float* a;
  const float* b;
  int64_t depth;  // K
  float* y;
  int64_t y_stride;       // floats from row to row
  const float* shift;     // null: none, and `relu` and `residual` are not looked at
  const float* residual;  // null: none
  int64_t residual_stride;
  bool relu;
  int channels;  // valid ones of vectors * VL
};

template <int ROWS, int VECTORS> static inline void finish(const Tile& t, vec (&sum)[ROWS][VECTORS]) {
  const bool whole = t.channels == VECTORS * VL;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    float* y = t.y + i * t.y_stride;
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      const int count = whole ? VL : t.channels - j * VL;
      if (count <= 0) continue;
      vec v = sum[i][j];
      if (t.shift) {
        v += count >= VL ? load(t.shift + j * VL) : load_part(t.shift + j * VL, count);
        if (t.residual) {
          const float* residual = t.residual + i * t.residual_stride + j * VL;
          v += count >= VL ? load(residual) : load_part(residual, count);
        }
        if (t.relu) v = relu(v);
      }
      if (count >= VL)
        store(y + j * VL, v);
      else
        store_part(y + j * VL, v, count);
    }
  }
}

template <int ROWS, int VECTORS> static void multiply(const Tile& t) {
  vec sum[ROWS][VECTORS] = {};
  const float* a = t.a;
  const float* b = t.b;
  auto steps = [&](int count) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < count; k++) {
      vec weights[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) weights[j] = load(b + j * VL);
      b += VECTORS * VL;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const vec x = VECTORS > 1 ? in_register(splat(a[i * VL + k])) : splat(a[i * VL + k]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] += x * weights[j];
      }
    }
  };
  for (int64_t k = 0; k + VL <= t.depth; k += VL, a += ROWS * VL) steps(VL);
  steps(int(t.depth % VL));
  finish<ROWS, VECTORS>(t, sum);
}

using Multiply = void (*)(const Tile&);

template <int ROWS> struct Table {
  static void fill(Multiply (*table)[NV]) {
    table[ROWS - 1][0] = multiply<ROWS, 1>;
    table[ROWS - 1][1] = multiply<ROWS, 2>;
    Table<ROWS - 1>::fill(table);
  }
};
template <> struct Table<0> {
  static void fill(Multiply (*)[NV]) {}
};

struct Multiplies {
  Multiply table[MR][NV];
  Multiplies() { Table<MR>::fill(table); }
};
static const Multiplies multiplies;

// rows: 1 to MR; the vectors are those that t.channels needs.
static inline void multiply(const Tile& t, int rows) { multiplies.table[rows - 1][t.channels > VL](t); }

}  // namespace RF_VARIANT
