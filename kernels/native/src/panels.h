// From an NHWC image to the panels that the register tile reads: patches gathered row by row, in the order r, s, c.
#pragma once

#include "abi.h"
#include "prologue.h"
#include "simd.h"

namespace RF_VARIANT {

// Of a patch of one group.
static inline int64_t patch_elements(const rf_shape& s) { return int64_t(s.r) * s.s * (s.c / s.groups); }

// The patches of a convolution, for some of its groups side by side.
template <class E> struct Patches {
  using Element = typename E::Element;

  const rf_shape& shape;
  const Element* x;
  int first_group, groups;
  Prologue prologue;  // of float32

  int channels() const { return shape.c / shape.groups; }  // of one group
  int64_t elements() const { return patch_elements(shape); }
  int64_t depth() const { return ceil_div(elements(), E::PER_UNIT); }  // in units, as below
  int64_t lines() const { return ceil_div(depth(), VL); }
};

// One run of `count` units, a multiple of VL, into the lines of a row, `step` units apart.
template <class E>
static inline void put_lines(float* line, int64_t step, const typename E::Element* from, int64_t count) {
  for (int64_t i = 0; i < count; i += VL, line += step) E::put_line(line, from + i * E::PER_UNIT);
}
static inline void put_activated(float* line, int64_t step, const float* from, const Prologue& by, int64_t count) {
  for (int64_t i = 0; i < count; i += VL, line += step)
    store(line, activated(load(from + i), load(by.scale + i), load(by.shift + i)));
}
static inline void copy_activated(float* to, const float* from, const Prologue& by, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) {
    const int some = int(smaller<int64_t>(VL, count - i));
    store_some<Float32>(to + i, by(from, i, some), some);
  }
}
template <class E> static inline void put_zeros(float* line, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; i += VL, line += step) store(line, (vec)(ivec{} + E::ZEROS));
}

// Whole vectors, the last one overlapping the one before.
static inline void copy(float* to, const float* from, int64_t count) {
  if (count < VL) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + VL <= count; i += VL) store(to + i, load(from + i));
  store(to + count - VL, load(from + count - VL));
}
template <class Element> static inline void copy(Element* to, const Element* from, int64_t count) {
  memcpy(to, from, count * sizeof *to);
}

// One patch of one group, contiguous. `x0`, `y0`: its corner.
template <class E>
static inline void put_patch(const Patches<E>& from, int group, const typename E::Element* image, int y0, int x0,
                             typename E::Element* to) {
  const rf_shape& s = from.shape;
  const int channels = from.channels();
  const int64_t run = int64_t(s.s) * channels;
  const bool dense = s.groups == 1 && s.dilation_w == 1 && x0 >= 0 && x0 + s.s <= s.w && !from.prologue;
  for (int r = 0; r < s.r; r++, to += run) {
    const int y = y0 + r * s.dilation_h;
    if (y < 0 || y >= s.h) {
      memset(to, 0, run * sizeof *to);
    } else if (dense) {
      copy(to, image + (int64_t(y) * s.w + x0) * s.c, run);
    } else {
      for (int t = 0; t < s.s; t++) {
        const int x = x0 + t * s.dilation_w;
        const auto* pixel = image + (int64_t(y) * s.w + x) * s.c + group * channels;
        if (x < 0 || x >= s.w)
          memset(to + t * channels, 0, channels * sizeof *to);
        else if (from.prologue)
          copy_activated((float*)(to + t * channels), (const float*)pixel, from.prologue.from(group * channels),
                         channels);
        else
          copy(to + t * channels, pixel, channels);
      }
    }
  }
  for (int64_t i = from.elements(); i % E::PER_UNIT; i++) *to++ = 0;  // the rest of the last unit
}

// Calls each(i, image, y0, x0) for `rows` output pixels from number `first` on, with the corner of each one's patch.
template <class Element, class Each>
static inline void each_patch(const rf_shape& s, const Element* x, int64_t first, int rows, Each each) {
  const int64_t pixel = first % (int64_t(s.p) * s.q);
  const Element* image = x + first / (int64_t(s.p) * s.q) * s.h * s.w * s.c;
  int p = int(pixel / s.q), q = int(pixel % s.q);
  for (int i = 0; i < rows; i++) {
    each(i, image, p * s.stride_h - s.pad_h, q * s.stride_w - s.pad_w);
    if (++q < s.q) continue;
    q = 0;
    if (++p < s.p) continue;
    p = 0, image += int64_t(s.h) * s.w * s.c;
  }
}

// `rows` patches, from the output pixel number `first` on: a panel for each group, `pitch` units apart. `staging` holds
// rows * lines * VL units.
template <class E>
static void gather(const Patches<E>& from, int64_t first, int rows, float* panels, int64_t pitch, float* staging) {
  using Element = typename E::Element;
  const rf_shape s = from.shape;  // a copy: a store of bytes may change any memory, as far as the compiler knows
  const int channels = from.channels();
  const int64_t step = int64_t(rows) * VL, width = from.lines() * VL;
  if (channels % (VL * E::PER_UNIT) == 0) {
    const int units = channels / E::PER_UNIT;
    const bool dense = s.groups == 1 && s.dilation_w == 1 && !from.prologue;
    each_patch(s, from.x, first, rows, [&](int i, const Element* image, int y0, int x0) {
      float* tap = panels + i * VL;
      for (int r = 0; r < s.r; r++) {
        const int y = y0 + r * s.dilation_h;
        if (dense && x0 >= 0 && x0 + s.s <= s.w && y >= 0 && y < s.h) {
          put_lines<E>(tap, step, image + (int64_t(y) * s.w + x0) * s.c, int64_t(s.s) * units);
          tap += s.s * (units / VL) * step;
          continue;
        }
        for (int t = 0; t < s.s; t++, tap += units / VL * step) {
          const int x = x0 + t * s.dilation_w;
          const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
          const Element* pixel = image + (int64_t(y) * s.w + x) * s.c + from.first_group * channels;
          for (int g = 0; g < from.groups; g++) {
            if (inside && from.prologue)
              put_activated(tap + g * pitch, step, (const float*)pixel + g * channels,
                            from.prologue.from((from.first_group + g) * channels), units);
            else if (inside)
              put_lines<E>(tap + g * pitch, step, pixel + g * channels, units);
            else
              put_zeros<E>(tap + g * pitch, step, units);
          }
        }
      }
    });
    return;
  }
  for (int g = 0; g < from.groups; g++, panels += pitch) {
    each_patch(s, from.x, first, rows, [&](int i, const Element* image, int y0, int x0) {
      put_patch(from, from.first_group + g, image, y0, x0, (Element*)(staging + i * width));
    });
    for (int i = 0; i < rows; i++) put_lines<E>(panels + i * VL, step, (const Element*)(staging + i * width), width);
  }
}

}  // namespace RF_VARIANT
