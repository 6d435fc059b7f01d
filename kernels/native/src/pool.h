// Pooling, element-wise and layout operations.
#pragma once

#include "abi.h"
#include "simd.h"
#include "work.h"

namespace RF_VARIANT {

static inline vec maximum(vec a, vec b) { return (b > a) | (b != b) ? b : a; }  // NaN wins

template <class Each> static inline void each_vector(int64_t count, Each each) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) each(i, VL);
  if (i < count) each(i, int(count - i));
}
static inline vec load_some(const float* p, int count) { return count == VL ? load(p) : load_part(p, count); }
static inline void store_some(float* p, vec v, int count) {
  if (count == VL)
    store(p, v);
  else
    store_part(p, v, count);
}

// y[channels] = the largest of the window's pixels, or their mean.
static inline void pool_pixel(const rf_shape& s, const float* image, int p, int q, float* y, bool mean) {
  const int y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
  const int top = larger(0, y0), bottom = smaller(s.h, y0 + s.r);
  const int left = larger(0, x0), right = smaller(s.w, x0 + s.s);
  const float pixels = float(larger(0, bottom - top) * larger(0, right - left));
  each_vector(s.k, [&](int64_t c, int count) {
    vec total = mean ? vec{} : splat(-__builtin_inff());
    for (int i = top; i < bottom; i++) {
      vec row = mean ? vec{} : total;  // a sum of its own: in one sum, roundings of the same sign would add up
      for (int j = left; j < right; j++) {
        const vec v = load_some(image + (int64_t(i) * s.w + j) * s.c + c, count);
        row = mean ? row + v : maximum(row, v);
      }
      total = mean ? total + row : row;
    }
    store_some(y + c, mean ? total / splat(pixels) : total, count);
  });
}

static void pool(const rf_shape& s, const float* x, float* y, bool mean, Team team) {
  const Range mine = share(int64_t(s.n) * s.p * s.q, team.thread, team.threads);
  for (int64_t at = mine.begin; at < mine.end; at++) {
    const int64_t image = at / (int64_t(s.p) * s.q), pixel = at % (int64_t(s.p) * s.q);
    pool_pixel(s, x + image * s.h * s.w * s.c, int(pixel / s.q), int(pixel % s.q), y + at * s.k, mean);
  }
}

static void add(const rf_shape& s, const float* x, const float* residual, float* y, Team team) {
  const Range mine = share(int64_t(s.n) * s.h * s.w * s.c, team.thread, team.threads);
  each_vector(mine.end - mine.begin, [&](int64_t i, int count) {
    i += mine.begin;
    vec v = load_some(x + i, count);
    if (residual) v += load_some(residual + i, count);
    store_some(y + i, s.relu ? relu(v) : v, count);
  });
}

// [n, c, h, w] to [n, h, w, c], or back: rows of the smaller matrix are written whole.
static void to_nhwc(const rf_shape& s, const float* x, float* y, Team team) {
  const int64_t pixels = int64_t(s.h) * s.w;
  const Range mine = share(s.n * int64_t(s.h), team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++) {
    const float* from = x + row / s.h * pixels * s.c + row % s.h * s.w;
    float* to = y + row * s.w * s.c;
    for (int c = 0; c < s.c; c++)
      for (int w = 0; w < s.w; w++) to[int64_t(w) * s.c + c] = from[c * pixels + w];
  }
}

static void to_nchw(const rf_shape& s, const float* x, float* y, Team team) {
  const int64_t pixels = int64_t(s.h) * s.w;
  const Range mine = share(int64_t(s.n) * s.c, team.thread, team.threads);
  for (int64_t plane = mine.begin; plane < mine.end; plane++) {
    const float* from = x + plane / s.c * pixels * s.c + plane % s.c;
    float* to = y + plane * pixels;
    for (int64_t i = 0; i < pixels; i++) to[i] = from[i * s.c];
  }
}

}  // namespace RF_VARIANT
