// What a convolution reads instead of its input, where that is the raw result of the one before: batch norm and ReLU.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

static inline vec activated(vec x, vec scale, vec shift) { return relu(multiply_add(shift, x, scale)); }

struct Prologue {
  const float *scale, *shift;  // [channels]; null: the input is read as it is

  explicit operator bool() const { return scale; }
  Prologue from(int64_t channel) const { return scale ? Prologue{scale + channel, shift + channel} : *this; }

  // `count` values from channel `channel` on, of a pixel that starts at `pixel`; the lanes after them are 0.
  vec operator()(const float* pixel, int64_t channel, int count) const {
    auto some = [&](const float* p) __attribute__((always_inline)) { return load_some<Float32>(p + channel, count); };
    return scale ? activated(some(pixel), some(scale), some(shift)) : some(pixel);
  }
};

}  // namespace RF_VARIANT
