// The register tile: [rows x K] times [K x NR], accumulated in registers, then scale-shift-residual-ReLU and stored.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

constexpr int LINE = 64 / sizeof(float);  // floats in a line of the cache

// Operands are counted in units of 32 bits, a float32 or two bfloat16: K means as many of them.
// Left operand: runs of K, in which row i, column k lies at a[i * STEP + k].
//  - STEP = VL, a "panel": [ceil(K / VL)][rows][VL]. A vector copy fills a line of it, one pointer walks through it, and
//    no two rows of a tile share a cache set, whatever the stride of the image. Nothing is read after K.
//  - STEP = 6: pixels of an RGB image, every other one, as they lie in memory.
// Right operand: [K][vectors * VL].
struct Left {
  const float* a;
  int64_t runs, run_step;  // whole runs, and floats from one to the next
  int run, tail;           // columns in each of them, and in a last, shorter one
};

static inline Left panel(const float* a, int rows, int64_t depth) {
  return {a, depth / VL, rows * VL, VL, int(depth % VL)};
}

// The weights of the next columns, which other tiles will read from memory: fetched meanwhile, an equal part by each of
// the tiles that share the weights at hand. Else the first of them would wait for memory, and memory for the others.
struct Ahead {
  const float* from;  // null: nothing
  int64_t step;       // floats from one run to the next
  int64_t floats;     // of each run

  // `weights`: [K][NR], for tile `part` of `parts`. Fewer would fetch so much at once that their own loads wait, and
  // more have little to wait for.
  static Ahead share(const float* weights, int64_t part, int64_t parts) {
    constexpr int64_t run = VL * NR;
    if (!weights || parts < 3 || parts > 8) return {nullptr, 0, 0};
    return {weights + run * part / parts, run, run * (part + 1) / parts - run * part / parts};
  }
};

template <class E> struct Tile {
  Left left;
  const float* b;
  typename E::Element* y;
  int64_t y_stride;    // elements from row to row
  const float* shift;  // null: none, and `relu` and `residual` are not looked at
  const typename E::Element* residual;  // null: none
  int64_t residual_stride;
  bool relu;
  int channels;  // valid ones of vectors * VL
  Ahead ahead;
};

template <class E, int ROWS, int VECTORS> static inline void finish(const Tile<E>& t, vec (&sum)[ROWS][VECTORS]) {
  const bool whole = t.channels == VECTORS * VL;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      const int count = whole ? VL : t.channels - j * VL;
      if (count <= 0) continue;
      vec v = sum[i][j];
      if (t.shift) {
        v += load_some<Float32>(t.shift + j * VL, count);
        if (t.residual) v += load_some<E>(t.residual + i * t.residual_stride + j * VL, count);
        if (t.relu) v = relu(v);
      }
      store_some<E>(t.y + i * t.y_stride + j * VL, v, count);
    }
  }
}

// What `finish` reads and writes lies in short pieces, a row of the image apart, which no hardware prefetcher sees coming.
template <class E, int ROWS, int VECTORS> static inline void fetch(const Tile<E>& t) {
  if (!t.shift) return;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      if (t.residual) __builtin_prefetch(t.residual + i * t.residual_stride + j * VL);
      __builtin_prefetch(t.y + i * t.y_stride + j * VL, 1);
    }
}

template <class E, int ROWS, int VECTORS, int STEP> static void multiply(const Tile<E>& t) {
  fetch<E, ROWS, VECTORS>(t);
  vec sum[ROWS][VECTORS] = {};
  const float* a = t.left.a;
  const float* b = t.b;
  auto columns = [&](int count) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < count; k++) {
      vec weights[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) weights[j] = load(b + j * VL);
      b += VECTORS * VL;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const vec unit = E::broadcast(a + i * STEP + k), x = VECTORS > 1 ? in_register(unit) : unit;
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] = E::multiply_add(sum[i][j], x, weights[j]);
      }
    }
  };
  const float* ahead = t.ahead.from;
  for (int64_t i = 0; i < t.left.runs; i++, a += t.left.run_step) {
    if (ahead) {
      for (int64_t j = 0; j < t.ahead.floats; j += LINE) __builtin_prefetch(ahead + j, 0, 2);
      ahead += t.ahead.step;
    }
    columns(STEP == VL ? VL : t.left.run);
  }
  columns(t.left.tail);
  finish(t, sum);
}

template <class E, int STEP> struct Multiplies {
  void (*table[MR][NV])(const Tile<E>&) = {};
  constexpr Multiplies() { fill<MR>(); }
  template <int ROWS> constexpr void fill() {
    table[ROWS - 1][0] = multiply<E, ROWS, 1, STEP>;
    table[ROWS - 1][1] = multiply<E, ROWS, 2, STEP>;
    if constexpr (ROWS > 1) fill<ROWS - 1>();
  }
};

// rows: 1 to MR; the vectors are those that t.channels needs.
template <int STEP = VL, class E> static inline void multiply(const Tile<E>& t, int rows) {
  static constexpr Multiplies<E, STEP> multiplies;
  multiplies.table[rows - 1][t.channels > VL](t);
}

}  // namespace RF_VARIANT
