// What a convolution reads instead of its input, where that is the raw result of the one before: batch norm and ReLU.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

struct Prologue {
  const float *scale, *offset;  // [channels]; null: the input is read as it is

  explicit operator bool() const { return scale; }
  Prologue from(int64_t channel) const { return scale ? Prologue{scale + channel, offset + channel} : *this; }
  // `count` values from channel `channel` on, of a pixel that starts at `pixel`; the lanes after them are 0.
  inline vec operator()(const float* pixel, int64_t channel, int count) const;
};

static inline vec activated(vec x, vec scale, vec offset) { return relu(x * scale + offset); }

inline vec Prologue::operator()(const float* pixel, int64_t channel, int count) const {
  const vec x = load_some<Float32>(pixel + channel, count);
  if (!scale) return x;
  return activated(x, load_some<Float32>(scale + channel, count), load_some<Float32>(offset + channel, count));
}

// `count` floats.
static inline void copy_activated(float* to, const float* from, const Prologue& prologue, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) {
    const int some = int(smaller<int64_t>(VL, count - i));
    auto part = [&](const float* p) __attribute__((always_inline)) { return load_some<Float32>(p + i, some); };
    store_some<Float32>(to + i, activated(part(from), part(prologue.scale), part(prologue.offset)), some);
  }
}

}  // namespace RF_VARIANT
