// The one-dimensional filters that Winograd's algorithm is made of.
#pragma once

#include "simd.h"

namespace RF_VARIANT {

// OUT outputs, STRIDE inputs apart, of TAPS taps, from IN inputs through POINTS points, each multiplied by one of
// WEIGHTS transformed weights. `weight` works on anything that adds and multiplies.
template <int OUT_, int STRIDE_, int TAPS_> struct FilterSize {
  static constexpr int OUT = OUT_, STRIDE = STRIDE_, TAPS = TAPS_;
  static constexpr bool EDGES = OUT == 4 && STRIDE > 0 && TAPS == 3;  // has an Edge for what its tiles leave over
  static constexpr int point_of(int point) { return point; }
  static constexpr int first_input(int output) { return output * STRIDE; }
};
template <int OUT, int STRIDE> struct Filter;

template <> struct Filter<2, 1> : FilterSize<2, 1, 3> {
  static constexpr int IN = 4, POINTS = 4, WEIGHTS = 4;
  static constexpr int weight_of(int point) { return point; }
  template <class T> static inline void input(const T (&d)[4], T (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  template <class T> static inline void output(const T (&m)[4], T (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  template <class T> static inline void weight(const T (&g)[3], T (&u)[4]) {
    u[0] = g[0];
    u[1] = (g[0] + g[1] + g[2]) / 2;
    u[2] = (g[0] - g[1] + g[2]) / 2;
    u[3] = g[2];
  }
};

template <> struct Filter<4, 1> : FilterSize<4, 1, 3> {
  static constexpr int IN = 6, POINTS = 6, WEIGHTS = 6;
  static constexpr int weight_of(int point) { return point; }
  template <class T> static inline void input(const T (&d)[6], T (&v)[6]) {
    const T a = multiply_add(d[4], -4, d[2]), b = multiply_add(d[3], -4, d[1]), c = d[4] - d[2], e = d[3] - d[1];
    v[0] = multiply_add(multiply_add(d[4], -5, d[2]), 4, d[0]);
    v[1] = a + b;
    v[2] = a - b;
    v[3] = multiply_add(c, 2, e);
    v[4] = multiply_add(c, -2, e);
    v[5] = multiply_add(multiply_add(d[5], -5, d[3]), 4, d[1]);
  }
  template <class T> static inline void output(const T (&m)[6], T (&y)[4]) {
    const T a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    y[0] = m[0] + a + c;
    y[1] = multiply_add(b, 2, e);
    y[2] = multiply_add(a, 4, c);
    y[3] = multiply_add(b, 8, e) + m[5];
  }
  template <class T> static inline void weight(const T (&g)[3], T (&u)[6]) {
    constexpr double SIXTH = 1.0 / 6;
    const T a = -(g[0] + g[2]) * SIXTH, b = g[1] * SIXTH, c = (g[0] / 4 + g[2]) * SIXTH, e = b / 2;
    u[0] = g[0] / 4;
    u[1] = a - b;
    u[2] = a + b;
    u[3] = c + e;
    u[4] = c - e;
    u[5] = g[2];
  }
};

// With stride 2, the outer taps see every other input, from the first one on, and the middle tap the ones between: a
// filter of two taps, F(OUT, 2), and one of a single tap, whose points are its inputs, all with the same weight.
template <> struct Filter<2, 2> : FilterSize<2, 2, 3> {
  static constexpr int IN = 5, POINTS = 5, WEIGHTS = 4;
  static constexpr int weight_of(int point) { return smaller(point, 3); }
  template <class T> static inline void input(const T (&d)[5], T (&v)[5]) {
    v[0] = d[0] - d[2];
    v[1] = d[2];
    v[2] = d[4] - d[2];
    v[3] = d[1];
    v[4] = d[3];
  }
  template <class T> static inline void output(const T (&m)[5], T (&y)[2]) {
    y[0] = m[0] + m[1] + m[3];
    y[1] = m[1] + m[2] + m[4];
  }
  template <class T> static inline void weight(const T (&g)[3], T (&u)[4]) {
    u[0] = g[0];
    u[1] = g[0] + g[2];
    u[2] = g[2];
    u[3] = g[1];
  }
};

template <> struct Filter<4, 2> : FilterSize<4, 2, 3> {  // the two taps at the points 0, 1, -1, 2 and infinity
  static constexpr int IN = 9, POINTS = 9, WEIGHTS = 6;
  static constexpr int weight_of(int point) { return smaller(point, 5); }
  template <class T> static inline void input(const T (&d)[9], T (&v)[9]) {
    const T a = d[6] - d[4];
    v[0] = multiply_add(d[6] - d[2], 2, d[0] - d[4]);
    v[1] = multiply_add(a, -2, d[2]);
    v[2] = multiply_add(a, 2, d[2] - d[4]);
    v[3] = d[6] - d[2];
    v[4] = multiply_add(d[8] - d[4], 2, d[2] - d[6]);
    v[5] = d[1];
    v[6] = d[3];
    v[7] = d[5];
    v[8] = d[7];
  }
  template <class T> static inline void output(const T (&m)[9], T (&y)[4]) {
    const T a = m[1] + m[2], b = m[1] - m[2];
    y[0] = m[0] + a + m[3] + m[5];
    y[1] = multiply_add(b, 2, m[3]) + m[6];
    y[2] = multiply_add(a, 4, m[3]) + m[7];
    y[3] = multiply_add(b, 8, m[3]) + m[4] + m[8];
  }
  template <class T> static inline void weight(const T (&g)[3], T (&u)[6]) {
    constexpr double SIXTH = 1.0 / 6;
    u[0] = g[0] / 2;
    u[1] = -(g[0] + g[2]) / 2;
    u[2] = (g[2] - g[0]) * SIXTH;
    u[3] = (g[0] + 2 * g[2]) * SIXTH;
    u[4] = g[2];
    u[5] = g[1];
  }
};

// With stride -2, the way back through stride 2: two outputs an input, of which the one that lies on it sees it through
// the middle tap, and the one after it sees it and the next input through the outer taps. So it is the filter of stride
// 2 with the same inputs for both, and the sums of the taps kept apart.
template <int PAIRS> struct Filter<PAIRS, -2> : FilterSize<2 * PAIRS, -2, 3> {
  using Forth = Filter<PAIRS, 2>;
  static constexpr int IN = PAIRS + 1, POINTS = Forth::POINTS, WEIGHTS = Forth::WEIGHTS;
  static constexpr int first_input(int output) { return output / 2; }
  static constexpr int weight_of(int point) { return Forth::weight_of(point); }
  template <class T> static inline void input(const T (&d)[IN], T (&v)[POINTS]) {
    T twice[Forth::IN];
    for (int i = 0; i < Forth::IN; i++) twice[i] = d[i / 2];
    Forth::input(twice, v);
  }
  template <class T> static inline void output(const T (&m)[POINTS], T (&y)[2 * PAIRS]) {
    T outer[POINTS], odd[PAIRS];
    for (int i = 0; i < POINTS; i++) outer[i] = i < IN ? m[i] : T{};
    Forth::output(outer, odd);
    for (int i = 0; i < PAIRS; i++) y[2 * i] = m[IN + i], y[2 * i + 1] = odd[i];
  }
  template <class T> static inline void weight(const T (&g)[3], T (&u)[WEIGHTS]) { Forth::weight(g, u); }
};

// What is left at the right and at the lower edge when an image is cut into tiles of four: one or two outputs, or three,
// from some of the points of Filter<4, STRIDE>, which `point_of` numbers, and so with its weights. The factors make up for
// the points that its weights were divided by the distance to, and that are not here.
template <int OUT, int STRIDE> struct Edge;

template <> struct Edge<2, 1> : FilterSize<2, 1, 3> {  // 0, 1, -1 and infinity
  static constexpr int IN = 4, POINTS = 4;
  static constexpr int point_of(int point) { return point < 3 ? point : 5; }
  template <class T> static inline void input(const T (&d)[4], T (&v)[4]) {
    v[0] = 4.0f * (d[0] - d[2]);
    v[1] = -3.0f * (d[1] + d[2]);
    v[2] = 3.0f * (d[1] - d[2]);
    v[3] = d[3] - d[1];
  }
  template <class T> static inline void output(const T (&m)[4], T (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

template <> struct Edge<3, 1> : FilterSize<3, 1, 3> {  // 0, 1, -1, 2 and infinity
  static constexpr int IN = 5, POINTS = 5;
  static constexpr int point_of(int point) { return point < 4 ? point : 5; }
  template <class T> static inline void input(const T (&d)[5], T (&v)[5]) {
    const T a = d[3] - d[1];
    v[0] = multiply_add(2.0f * a, 4, d[0] - d[2]);
    v[1] = 3.0f * multiply_add(d[3] - d[2], -2, d[1]);
    v[2] = multiply_add(multiply_add(d[3], -3, d[2]), 2, d[1]);
    v[3] = 4.0f * a;
    v[4] = multiply_add(d[4] - d[2], -2, a);
  }
  template <class T> static inline void output(const T (&m)[5], T (&y)[3]) {
    const T a = m[1] + m[2], b = m[1] - m[2];
    y[0] = m[0] + a + m[3];
    y[1] = multiply_add(b, 2, m[3]);
    y[2] = multiply_add(a, 4, m[3]) + m[4];
  }
};

template <> struct Edge<2, 2> : FilterSize<2, 2, 3> {  // two taps: 0, 1 and infinity
  static constexpr int IN = 5, POINTS = 5;
  static constexpr int point_of(int point) { return point < 2 ? point : point + 2; }
  template <class T> static inline void input(const T (&d)[5], T (&v)[5]) {
    v[0] = 2.0f * (d[0] - d[2]);
    v[1] = -2.0f * d[2];
    v[2] = d[4] - d[2];
    v[3] = d[1];
    v[4] = d[3];
  }
  template <class T> static inline void output(const T (&m)[5], T (&y)[2]) {
    Filter<2, 2>::output(m, y);
  }
};

template <> struct Edge<3, 2> : FilterSize<3, 2, 3> {  // two taps: 0, 1, -1 and infinity
  static constexpr int IN = 7, POINTS = 7;
  static constexpr int point_of(int point) { return point < 3 ? point : point + 1; }
  template <class T> static inline void input(const T (&d)[7], T (&v)[7]) {
    v[0] = 2.0f * (d[0] - d[4]);
    v[1] = 0.0f - d[2] - d[4];
    v[2] = 3.0f * (d[2] - d[4]);
    v[3] = d[6] - d[2];
    v[4] = d[1];
    v[5] = d[3];
    v[6] = d[5];
  }
  template <class T> static inline void output(const T (&m)[7], T (&y)[3]) {
    const T a = m[1] + m[2];
    y[0] = m[0] + a + m[4];
    y[1] = m[1] - m[2] + m[5];
    y[2] = a + m[3] + m[6];
  }
};

}  // namespace RF_VARIANT
