// Pooling, element-wise and layout operations.
#pragma once

#include "abi.h"
#include "simd.h"
#include "work_sharing.h"

namespace RF_VARIANT {

static inline vec maximum(vec a, vec b) { return ((b > a) | (b != b)) ? b : a; }  // NaN wins

template <class Each> static inline void each_vector(int64_t count, Each each) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) each(i, VL);
  if (i < count) each(i, int(count - i));
}

// The largest of the window's pixels in channels that need no conversion; how many these are.
template <class Element>
static inline int64_t max_of_bytes(const rf_shape& s, const Element* image, Range rows, Range columns, Element* y) {
  typedef int8_t wide __attribute__((vector_size(VL * 4)));
  typedef int8_t wide_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));
  if constexpr (sizeof(Element) > 1) return 0;
  const int64_t channels = s.k / (VL * 4) * (VL * 4);
  for (int64_t c = 0; c < channels; c += VL * 4) {
    wide most = wide{} + int8_t(-128);
    for (int64_t i = rows.begin; i < rows.end; i++)
      for (int64_t j = columns.begin; j < columns.end; j++) {
        const wide v = *(const wide_u*)(image + (i * s.w + j) * s.c + c);
        most = v > most ? v : most;
      }
    *(wide_u*)(y + c) = most;
  }
  return channels;
}

// y[channels] = the largest of the window's pixels, or their mean.
template <class E>
static inline void pool_pixel(const rf_shape& s, const typename E::Element* image, int p, int q,
                              typename E::Element* y, bool mean) {
  const int y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
  const int top = larger(0, y0), bottom = smaller(s.h, y0 + s.r);
  const int left = larger(0, x0), right = smaller(s.w, x0 + s.s);
  const float pixels = float(larger(0, bottom - top)) * float(larger(0, right - left));
  const int64_t done = mean ? 0 : max_of_bytes(s, image, {top, bottom}, {left, right}, y);
  each_vector(s.k - done, [&](int64_t c, int count) {
    c += done;
    vec total = mean ? vec{} : splat(-__builtin_inff());
    for (int i = top; i < bottom; i++) {
      vec row = mean ? vec{} : total;  // rows are summed apart: the error grows with their length, not with the image
      for (int j = left; j < right; j++) {
        const vec v = load_some<E>(image + (int64_t(i) * s.w + j) * s.c + c, count);
        row = mean ? row + v : maximum(row, v);
      }
      total = mean ? total + row : row;
    }
    store_some<E>(y + c, mean ? total / splat(pixels) : total, count);
  });
}

template <class E>
static void pool(const rf_shape& s, const typename E::Element* x, typename E::Element* y, bool mean, Team team) {
  const Range mine = share(int64_t(s.n) * s.p * s.q, team.thread, team.threads);
  for (int64_t at = mine.begin; at < mine.end; at++) {
    const int64_t image = at / (int64_t(s.p) * s.q), pixel = at % (int64_t(s.p) * s.q);
    pool_pixel<E>(s, x + image * s.h * s.w * s.c, int(pixel / s.q), int(pixel % s.q), y + at * s.k, mean);
  }
}

template <class E>
static void add(const rf_shape& s, const typename E::Element* x, const typename E::Element* residual,
                typename E::Element* y, Team team) {
  const Range mine = share(int64_t(s.n) * s.h * s.w * s.c, team.thread, team.threads);
  each_vector(mine.end - mine.begin, [&](int64_t i, int count) {
    i += mine.begin;
    vec v = load_some<E>(x + i, count);
    if (residual) v += load_some<E>(residual + i, count);
    store_some<E>(y + i, s.relu ? relu(v) : v, count);
  });
}

// y = x * factor, element by element.
template <class From, class To>
static void scale_all(const rf_shape& s, const typename From::Element* x, float factor, typename To::Element* y, Team team) {
  const Range mine = share(int64_t(s.n) * s.h * s.w * s.c, team.thread, team.threads);
  each_vector(mine.end - mine.begin, [&](int64_t i, int count) {
    i += mine.begin;
    store_some<To>(y + i, load_some<From>(x + i, count) * splat(factor), count);
  });
}

// [n, c, h, w] to [n, h, w, c], a row of pixels at a time; and back, a plane at a time.
template <class Element> static void to_nhwc(const rf_shape& s, const Element* x, Element* y, Team team) {
  const int64_t pixels = int64_t(s.h) * s.w;
  const Range mine = share(s.n * int64_t(s.h), team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++) {
    const Element* from = x + row / s.h * pixels * s.c + row % s.h * s.w;
    Element* to = y + row * s.w * s.c;
    for (int c = 0; c < s.c; c++)
      for (int w = 0; w < s.w; w++) to[int64_t(w) * s.c + c] = from[c * pixels + w];
  }
}
template <class Element> static void to_nchw(const rf_shape& s, const Element* x, Element* y, Team team) {
  const int64_t pixels = int64_t(s.h) * s.w;
  const Range mine = share(int64_t(s.n) * s.c, team.thread, team.threads);
  for (int64_t plane = mine.begin; plane < mine.end; plane++) {
    const Element* from = x + plane / s.c * pixels * s.c + plane % s.c;
    Element* to = y + plane * pixels;
    for (int64_t i = 0; i < pixels; i++) to[i] = from[i * s.c];
  }
}

}  // namespace RF_VARIANT
