// How a register tile of int8 ends: from integer sums to real numbers, and to the next image's steps.
#pragma once

#include "int8.h"
#include "register_tile.h"

namespace RF_VARIANT {

// What follows the integer sums of some channels. The operands are copies: a store of bytes may change anything in memory,
// as far as the compiler knows.
struct Requantiser {
  const vec factor, lowest;  // -infinity, or what a ReLU has
  const int64_t stride;
  const int8_t* const residual;
  int8_t* const y;

  Requantiser(const Requantise& by, bool relu, const int8_t* residual, int8_t* y, int64_t stride)
      : factor(splat(by.factor)), lowest(splat(relu ? 0 : -__builtin_inff())), stride(stride), residual(residual), y(y) {}
  explicit Requantiser(const Tile<Int8>& t) : Requantiser(t.requantise, t.relu, t.residual, t.y, t.stride) {}

  vec real(ivec sum, vec scale, vec shift) const { return __builtin_convertvector(sum, vec) * scale + shift; }
  vec add(vec v, vec residual) const { return v + residual * factor; }
  vec activated(vec v) const { return max_or_second(lowest, v); }  // NaN stays

  // One vector of channels, from element number `at` on.
  void finish(int64_t at, ivec sum, vec scale, vec shift, bool to_float) const {
    vec v = real(sum, scale, shift);
    if (residual) v = add(v, Int8::load(residual + at));
    v = activated(v);
    if (to_float)
      store((float*)y + at, v);
    else
      Int8::store(y + at, v);
  }
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
    each_vector<ROWS, VECTORS>([&](int i, int j) {
      by.finish(i * by.stride + j * VL, sum[i][j], scale[j], shift[j], true);
    });
  else if (by.residual)
    each([&](int64_t at, vec v) __attribute__((always_inline)) {
      Int8::store(by.y + at, by.activated(by.add(v, Int8::load(by.residual + at))));
    });
  else
    each([&](int64_t at, vec v) __attribute__((always_inline)) { Int8::store(by.y + at, by.activated(v)); });
}

// The same where not all channels of the vectors are valid.
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

}  // namespace RF_VARIANT
