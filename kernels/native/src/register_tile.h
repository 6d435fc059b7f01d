// The register tile: [rows x K] times [K x NR], accumulated in registers, then scale-shift-residual-ReLU and stored.
#pragma once

#include "int8.h"
#include "simd.h"

namespace RF_VARIANT {

// Operands are counted in units of 32 bits, a float32, two bfloat16 or up to four int8: K means as many of them.
// Left operand: runs of K, in which row i, column k lies i * STEP bytes and k units from a.
//  - STEP = PANEL_STEP, a "panel": [ceil(K / VL)][rows][VL]. A vector copy fills a line of it, one pointer walks through
//    it, and no two rows of a tile share a cache set, whatever the stride of the image. Nothing is read after K.
//  - Else it is that of pixels in an RGB image, every other one, as they lie in memory.
// Right operand: [K][vectors * VL], after what the sums begin with where E::START_ROWS is 1.
constexpr int UNIT = 4;  // bytes
constexpr int PANEL_STEP = VL * UNIT;

struct Left {
  const char* a;
  int64_t runs, run_step;  // whole runs, and bytes from one to the next
  int run, tail;           // columns in each of them, and in a last, shorter one
};

static inline Left panel(const float* a, int rows, int64_t depth) {
  return {(const char*)a, depth / VL, rows * PANEL_STEP, VL, int(depth % VL)};
}

// The weights of the next columns, which other tiles will read from memory: fetched meanwhile, an equal part by each of
// the tiles that share the weights at hand. Else the first of them would wait for memory, and memory for the others.
struct Ahead {
  const char* from;  // null: nothing
  int64_t step;      // bytes from one run to the next
  int64_t bytes;     // of each run

  // `weights`: [K][NR], for tile `part` of `parts`. A single one would fetch so much at once that its own loads wait,
  // and more than eight have little to wait for.
  template <class Packed> static Ahead share(const Packed* weights, int64_t part, int64_t parts) {
    constexpr int64_t run = VL * NR * sizeof(Packed);
    if (!weights || parts < 2 || parts > 8) return {nullptr, 0, 0};
    return {(const char*)weights + run * part / parts, run, run * (part + 1) / parts - run * part / parts};
  }
};

// What follows the integer sums of int8.
struct Requantise {
  const float* scale;  // of each channel
  float factor;        // of the residual
  bool to_float;       // y holds float32

  Requantise from(int64_t channel) const { return {scale ? scale + channel : nullptr, factor, to_float}; }
};

template <class E> struct Tile {
  Left left;
  const typename E::Packed* b;
  typename E::Element* y;
  int64_t stride;      // elements from row to row of `y` and `residual`
  const float* shift;  // null: none, and `relu` and `residual` are not looked at
  const typename E::Element* residual;  // null: none
  bool relu;
  int channels;  // valid ones of vectors * VL
  Ahead ahead;
  const typename E::Element* next_residual;  // of the tile after this one, to be fetched meanwhile; null: nothing
  Requantise requantise{};                   // of int8
};

// Calls use(i, j) for every vector of a tile.
template <int ROWS, int VECTORS, class Use> static inline void each_vector(Use use) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) use(i, j);
}

template <class E, int ROWS, int VECTORS> static inline void finish(const Tile<E>& t, vec (&sum)[ROWS][VECTORS]) {
  auto each = [](auto use) __attribute__((always_inline)) { each_vector<ROWS, VECTORS>(use); };
  if (t.shift) {
    each([&](int i, int j) __attribute__((always_inline)) { sum[i][j] += load(t.shift + j * VL); });
    if (t.residual)
      each([&](int i, int j) __attribute__((always_inline)) {
        sum[i][j] += E::load(t.residual + i * t.stride + j * VL);
      });
    if (t.relu) each([&](int i, int j) __attribute__((always_inline)) { sum[i][j] = relu(sum[i][j]); });
  }
  each([&](int i, int j) __attribute__((always_inline)) { E::store(t.y + i * t.stride + j * VL, sum[i][j]); });
}

// What follows the integer sums of some channels. The operands are copies: a store of bytes may change anything in memory,
// as far as the compiler knows.
struct Requantiser {
  const vec factor, lowest;  // -infinity, or what a ReLU has
  const int64_t stride;
  const int8_t* const residual;
  int8_t* const y;

  explicit Requantiser(const Tile<Int8>& t)
      : factor(splat(t.requantise.factor)), lowest(splat(t.relu ? 0 : -__builtin_inff())), stride(t.stride),
        residual(t.residual), y(t.y) {}

  vec real(ivec sum, vec scale, vec shift) const { return __builtin_convertvector(sum, vec) * scale + shift; }
  vec add(vec v, vec residual) const { return v + residual * factor; }
  vec activated(vec v) const { return max_or_second(lowest, v); }  // NaN stays
};

template <int ROWS, int VECTORS> static inline void finish(const Tile<Int8>& t, ivec (&sum)[ROWS][VECTORS]) {
  const Requantiser by(t);
  vec scale[VECTORS], shift[VECTORS];
  for (int j = 0; j < VECTORS; j++) scale[j] = load(t.requantise.scale + j * VL), shift[j] = load(t.shift + j * VL);
  auto each = [&](auto to) __attribute__((always_inline)) {
    each_vector<ROWS, VECTORS>([&](int i, int j) __attribute__((always_inline)) {
      to(i * by.stride + j * VL, by.real(sum[i][j], scale[j], shift[j]));
    });
  };
  if (t.requantise.to_float)
    each([&](int64_t at, vec v) __attribute__((always_inline)) {
      if (by.residual) v = by.add(v, Int8::load(by.residual + at));
      store((float*)by.y + at, by.activated(v));
    });
  else if (by.residual)
    each([&](int64_t at, vec v) __attribute__((always_inline)) {
      Int8::store(by.y + at, by.activated(by.add(v, Int8::load(by.residual + at))));
    });
  else
    each([&](int64_t at, vec v) __attribute__((always_inline)) { Int8::store(by.y + at, by.activated(v)); });
}

// The same where not all channels of the vectors are valid.
template <class E> static __attribute__((noinline)) void finish_part(const Tile<E>& t, const vec* sum, int rows) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < t.channels; j += VL) {
      const int count = smaller(VL, t.channels - j);
      vec v = *sum++;
      if (t.shift) {
        v += load_some<Float32>(t.shift + j, count);
        if (t.residual) v += load_some<E>(t.residual + i * t.stride + j, count);
        if (t.relu) v = relu(v);
      }
      store_some<E>(t.y + i * t.stride + j, v, count);
    }
}

static __attribute__((noinline)) void finish_part(const Tile<Int8>& t, const ivec* sum, int rows) {
  const Requantiser by(t);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < t.channels; j += VL) {
      const int count = smaller(VL, t.channels - j);
      const int64_t at = i * by.stride + j;
      vec v = by.real(*sum++, load_some<Float32>(t.requantise.scale + j, count), load_some<Float32>(t.shift + j, count));
      if (by.residual) v = by.add(v, load_some<Int8>(by.residual + at, count));
      v = by.activated(v);
      if (t.requantise.to_float)
        store_some<Float32>((float*)by.y + at, v, count);
      else
        store_some<Int8>(by.y + at, v, count);
    }
}

template <class E, int ROWS, int VECTORS, int STEP> static void multiply(const Tile<E>& t) {
  // A residual lies in short pieces, a row of the image apart, which no hardware prefetcher sees coming: fetched a tile
  // ahead, a few rows at a time. (Not in a function of its own: GCC takes one that only fetches for one without effect,
  // and drops the call.)
  const int rows_at_a_time = t.left.runs < ROWS / 4 ? ROWS : 4;
  int fetched = t.next_residual ? 0 : ROWS;
  typename E::Sum sum[ROWS][VECTORS] = {};
  const char* a = t.left.a;
  const auto* b = t.b;
  if constexpr (E::START_ROWS) {
    each_vector<ROWS, VECTORS>([&](int i, int j) __attribute__((always_inline)) { sum[i][j] = E::load_weights(b + j * VL); });
    b += VECTORS * VL;
  }
  auto columns = [&](int count) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < count; k++) {
      typename E::Sum weights[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) weights[j] = E::load_weights(b + j * VL);
      b += VECTORS * VL;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const auto unit = E::broadcast(a + i * STEP + k * UNIT), x = VECTORS > 1 ? in_register(unit) : unit;
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] = E::multiply_add(sum[i][j], x, weights[j]);
      }
    }
  };
  const char* ahead = t.ahead.from;
  for (int64_t i = 0; i < t.left.runs; i++, a += t.left.run_step) {
    if (ahead) {
      for (int64_t j = 0; j < t.ahead.bytes; j += LINE * sizeof(float)) __builtin_prefetch(ahead + j, 0, 2);
      ahead += t.ahead.step;
    }
    for (const int end = smaller(fetched + rows_at_a_time, ROWS); fetched < end; fetched++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) __builtin_prefetch(t.next_residual + fetched * t.stride + j * VL);
    columns(STEP == PANEL_STEP ? VL : t.left.run);
  }
  columns(t.left.tail);
  if (t.channels == VECTORS * VL) return finish(t, sum);
  typename E::Sum sums[ROWS * VECTORS];  // a copy: the sums themselves would live in memory if somebody asked for their address
  each_vector<ROWS, VECTORS>([&](int i, int j) __attribute__((always_inline)) { sums[i * VECTORS + j] = sum[i][j]; });
  finish_part(t, sums, ROWS);
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
template <int STEP = PANEL_STEP, class E> static inline void multiply(const Tile<E>& t, int rows) {
  static constexpr Multiplies<E, STEP> multiplies;
  multiplies.table[rows - 1][t.channels > VL](t);
}

}  // namespace RF_VARIANT
