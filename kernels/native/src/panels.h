// From an NHWC image to the panels that the register tile reads: patches gathered row by row, in the order r, s, c.
#pragma once

#include "abi.h"
#include "simd.h"

namespace RF_VARIANT {

// Where a convolution's patches lie.
struct Patches {
  const rf_shape& shape;
  const float* x;
  int channels;       // of one group
  int first_channel;  // of that group

  int64_t depth() const { return int64_t(shape.r) * shape.s * channels; }
};

static inline void copy_line(float* to, const float* from) { store(to, load(from)); }

// One run of `count` floats, a multiple of VL, into the lines of a row; `from` null writes zeros.
static inline float* put_lines(float* line, int64_t step, const float* from, int64_t count) {
  if (from)
    for (int64_t i = 0; i < count; i += VL, line += step) copy_line(line, from + i);
  else
    for (int64_t i = 0; i < count; i += VL, line += step) store(line, vec{});
  return line;
}

// One patch in a row, contiguous.
static inline void put_patch(const Patches& from, const float* image, int y0, int x0, float* to) {
  const rf_shape& s = from.shape;
  const bool dense = s.groups == 1 && s.dilation_w == 1 && x0 >= 0 && x0 + s.s <= s.w;
  for (int r = 0; r < s.r; r++) {
    const int y = y0 + r * s.dilation_h;
    const int64_t run = int64_t(s.s) * from.channels;
    if (y < 0 || y >= s.h) {
      memset(to, 0, run * sizeof(float));
    } else if (dense) {
      const float* row = image + (int64_t(y) * s.w + x0) * s.c;
      int64_t i = 0;
      for (; i + VL <= run; i += VL) store(to + i, load(row + i));
      for (; i < run; i++) to[i] = row[i];
    } else {
      for (int t = 0; t < s.s; t++) {
        const int x = x0 + t * s.dilation_w;
        float* pixel = to + int64_t(t) * from.channels;
        if (x < 0 || x >= s.w)
          memset(pixel, 0, from.channels * sizeof(float));
        else
          memcpy(pixel, image + (int64_t(y) * s.w + x) * s.c + from.first_channel, from.channels * sizeof(float));
      }
    }
    to += run;
  }
}

// `rows` patches, from the output pixel number `first` on, as one panel. `staging` holds rows * (depth + VL) floats.
static void gather(const Patches& from, int64_t first, int rows, float* panel, float* staging) {
  const rf_shape& s = from.shape;
  const int64_t depth = from.depth(), step = int64_t(rows) * VL;
  const bool whole_lines = from.channels % VL == 0;
  const int64_t pitch = round_up(depth, VL);
  int64_t image = first / (int64_t(s.p) * s.q), pixel = first % (int64_t(s.p) * s.q);
  int p = int(pixel / s.q), q = int(pixel % s.q);
  for (int i = 0; i < rows; i++) {
    const float* base = from.x + image * s.h * s.w * s.c;
    const int y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
    if (whole_lines) {
      float* line = panel + i * VL;
      for (int r = 0; r < s.r; r++) {
        const int y = y0 + r * s.dilation_h;
        for (int t = 0; t < s.s; t++) {
          const int x = x0 + t * s.dilation_w;
          const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
          const float* run = inside ? base + (int64_t(y) * s.w + x) * s.c + from.first_channel : nullptr;
          line = put_lines(line, step, run, from.channels);
        }
      }
    } else {
      put_patch(from, base, y0, x0, staging + i * pitch);
    }
    if (++q == s.q) {
      q = 0;
      if (++p == s.p) p = 0, image++;
    }
  }
  if (!whole_lines)
    for (int i = 0; i < rows; i++) {
      float* line = panel + i * VL;
      for (int64_t k = 0; k < depth; k += VL, line += step) copy_line(line, staging + i * pitch + k);
    }
}

}  // namespace RF_VARIANT
