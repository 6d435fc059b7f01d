// Weights as a network holds them, for the algorithms to pack: in any layout, float32 or float64, with or without a
// scale for each output channel.
#pragma once

#include "abi.h"
#include "simd.h"
#include "work_sharing.h"

namespace RF_VARIANT {

constexpr int HALF = VL / 2;  // doubles in a vector
typedef double dvec __attribute__((vector_size(HALF * 8)));
typedef double dvec_u __attribute__((vector_size(HALF * 8), aligned(8), may_alias));
typedef float half_u __attribute__((vector_size(HALF * 4), aligned(4), may_alias));

// Rounded to float32.
static inline void store_rounded(float* to, dvec v) { *(half_u*)to = __builtin_convertvector(v, half_u); }

// VL weights, each at its place in the unit of its lane.
template <class E> static inline void put_weights(typename E::Element* to, const double* from) {
  for (int lane = 0; lane < VL; lane++) to[lane * E::PER_UNIT] = E::narrow(float(from[lane]));
}

struct WeightSource {
  const rf_shape& shape;
  const rf_weight& weight;

  static constexpr int CHUNK = 16;  // input channels at a time: with 3x3 taps, a block takes half the first-level cache
  int taps() const { return shape.r * shape.s; }
  int inputs() const { return shape.c / shape.groups; }
  int outputs() const { return shape.k / shape.groups; }
  int64_t block_doubles() const { return int64_t(taps()) * CHUNK * VL; }

  double at(int k, int c, int r, int s) const {
    const int64_t i = place(k) + c * weight.c + r * weight.r + s * weight.s;
    return (weight.is_double ? ((const double*)weight.data)[i] : ((const float*)weight.data)[i]) * scale(k);
  }

  // `lanes` output channels from `k` on, of `count` input channels from `c` on: [taps][count][VL], 0 in further lanes.
  void block(int k, int lanes, int c, int count, double* to) const {
    if (weight.is_double)
      fill((const double*)weight.data, k, lanes, c, count, to);
    else
      fill((const float*)weight.data, k, lanes, c, count, to);
  }

 private:
  int64_t place(int k) const { return k / outputs() * weight.group + k % outputs() * weight.k; }
  double scale(int k) const { return weight.scale ? weight.scale[k] : 1; }

  template <class T> void fill(const T* from, int k, int lanes, int c, int count, double* to) const {
    from += c * weight.c;
    if (lanes == VL && weight.k == 1 && k / outputs() == (k + VL - 1) / outputs()) {  // side by side in memory
      double scales[VL];
      for (int lane = 0; lane < VL; lane++) scales[lane] = scale(k + lane);
      each(from + place(k), count, [&](const T* lanes_at, int64_t row) __attribute__((always_inline)) {
        for (int lane = 0; lane < VL; lane++) to[row * VL + lane] = lanes_at[lane] * scales[lane];
      });
      return;
    }
    if (lanes < VL) memset(to, 0, int64_t(taps()) * count * VL * sizeof *to);
    for (int lane = 0; lane < lanes; lane++) {
      const double by = scale(k + lane);
      each(from + place(k + lane), count, [&](const T* one, int64_t row) __attribute__((always_inline)) {
        to[row * VL + lane] = *one * by;
      });
    }
  }

  // Calls use(place, number) for every tap of `count` input channels.
  template <class T, class Use> void each(const T* from, int count, Use use) const {
    int64_t row = 0;
    for (int r = 0; r < shape.r; r++)
      for (int s = 0; s < shape.s; s++) {
        const T* at = from + r * weight.r + s * weight.s;
        for (int i = 0; i < count; i++, at += weight.c) use(at, row++);
      }
  }
};

}  // namespace RF_VARIANT
