// The stem of every ResNet, 7x7 with stride 2 on an RGB image, by Winograd's F(4x4, 4x4).
//
// Two by two pixels of the image, side by side, are a pixel of twelve channels of an image half as high and wide, on
// which the convolution has stride 1 and half as many taps: the even ones and the odd ones.
#pragma once

#include "winograd.h"

namespace RF_VARIANT {

// Four taps at the points 0, 1, -1, 2, -2, 1/2 and -1/2. Rows of the input transform are the coefficients of the
// product of (x - q) over all points q but the row's own. In pairs, p and -p have all but a sign in common.
struct FourTaps : FilterSize<4, 1, 4> {
  static constexpr int IN = 7, POINTS = 7, WEIGHTS = 7;
  static constexpr int weight_of(int point) { return point; }
  template <class T> static inline void input(const T (&d)[7], T (&v)[7]) {
    v[0] = multiply_add(d[6] - d[0], 5.25f, d[2] - d[4]);
    pair(d, 1.0f, 4.25f, 1.0f, v[1], v[2]);
    pair(d, 2.0f, 1.25f, 0.25f, v[3], v[4]);
    pair(d, 0.5f, 5.0f, 4.0f, v[5], v[6]);
  }
  // x (x^4 - sum x^2 + product) (x + point), and for the other of the pair with -point: `sum` and `product` are of the
  // squares of the other two pairs.
  template <class T>
  static inline void pair(const T (&d)[7], float point, float sum, float product, T& plus, T& minus) {
    const T even = multiply_add(multiply_add(d[6], -sum, d[4]), product, d[2]);
    const T odd = multiply_add(multiply_add(d[5], -sum, d[3]), product, d[1]);
    plus = multiply_add(even, point, odd);
    minus = multiply_add(even, -point, odd);
  }
  template <class T> static inline void output(const T (&m)[7], T (&y)[4]) {
    const T a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4], f = m[5] + m[6], g = m[5] - m[6];
    y[0] = m[0] + a + c + f;
    y[1] = multiply_add(multiply_add(b, 2, e), 0.5f, g);
    y[2] = multiply_add(multiply_add(a, 4, c), 0.25f, f);
    y[3] = multiply_add(multiply_add(b, 8, e), 0.125f, g);
  }
  template <class T> static inline void weight(const T (&g)[4], T (&u)[7]) {
    constexpr double points[7] = {0, 1, -1, 2, -2, 0.5, -0.5};
    for (int i = 0; i < 7; i++) {
      double others = 1;
      for (int j = 0; j < 7; j++)
        if (j != i) others *= points[i] - points[j];
      u[i] = (g[0] + points[i] * (g[1] + points[i] * (g[2] + points[i] * g[3]))) / others;
    }
  }
};

struct WinogradStem {
  using Weights = WinogradWeights<FourTaps>;
  static constexpr int TAPS = FourTaps::TAPS, CHANNELS = 12;
  static constexpr int PIXEL = (CHANNELS + VL - 1) / VL * VL;  // floats, so that channels are whole vectors
  static constexpr int ROWS_AT_A_TIME = 2 * FourTaps::OUT;

  static bool supports(const rf_shape& s) {
    return s.dtype == RF_FLOAT32 && s.c == 3 && s.groups == 1 && s.stride_h == 2 && s.stride_w == 2 &&
           s.dilation_h == 1 && s.dilation_w == 1 && fits(s.r) && fits(s.s);
  }
  static bool fits(int window) { return window > TAPS && window <= 2 * TAPS; }  // smaller ones do not need four taps

  // The convolution with stride 1, for some rows of one image.
  static rf_shape halved(const rf_shape& s, int rows) {
    rf_shape half{};
    half.n = half.groups = 1, half.p = rows, half.q = s.q, half.k = s.k, half.c = CHANNELS, half.relu = s.relu;
    half.r = half.s = TAPS;
    half.h = int(round_up(rows, FourTaps::OUT)) + TAPS - 1;
    half.w = int(round_up(s.q, FourTaps::OUT)) + TAPS - 1;
    return half;
  }

  static int64_t products(const rf_shape& s) {
    return s.n * ceil_div(s.p, FourTaps::OUT) * ceil_div(s.q, FourTaps::OUT) * FourTaps::IN * FourTaps::IN * CHANNELS / 3;
  }

  static int64_t packed_floats(const rf_shape& s) { return Weights::floats(halved(s, 1)); }

  static void pack(const WeightSource& from, float* packed, Team team) {
    const rf_shape& s = from.shape;
    auto* half = new double[int64_t(s.k) * CHANNELS * TAPS * TAPS]();  // too small to be worth sharing
    for (int k = 0; k < s.k; k++)
      for (int c = 0; c < 3; c++)
        for (int i = 0; i < s.r; i++)
          for (int j = 0; j < s.s; j++) {
            const int channel = (i % 2 * 2 + j % 2) * 3 + c;
            half[((int64_t(k) * CHANNELS + channel) * TAPS + i / 2) * TAPS + j / 2] = from.at(k, c, i, j);
          }
    const rf_weight weight{half, nullptr, 0, CHANNELS * TAPS * TAPS, TAPS * TAPS, TAPS, 1, 1, 0};
    Weights::pack({halved(s, 1), weight}, packed, team);
    delete[] half;
  }

  // The output rows `rows`, counted over all images; from the first row of a tile on.
  static void part(const ConvTask<Float32>& task, Range rows) {
    const rf_shape& s = task.shape;
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t number = row / s.p, p = row % s.p;
      const int count = int(smaller(smaller<int64_t>(ROWS_AT_A_TIME, s.p - p), rows.end - row));
      const rf_shape half = halved(s, count);
      float* image = scratch(IMAGE, int64_t(half.h) * half.w * PIXEL);
      fold(s, task.x + number * s.h * s.w * 3, int(p), half, image);
      const float* residual = task.residual ? task.residual + row * s.q * s.k : nullptr;
      float* y = task.y + (row * s.q - task.y_row) * s.k;
      WinogradTask band({half, image, task.packed, task.shift, residual, y, 0, {}, {}});
      band.pixel = PIXEL;
      Winograd<FourTaps>::conv(band, {0, 1});
      row += count;
    }
  }

  // The pixels that the output rows from `p` on see, and zeros where there are none.
  static void fold(const rf_shape& s, const float* x, int p, const rf_shape& half, float* image) {
    memset(image, 0, int64_t(half.h) * half.w * PIXEL * sizeof(float));
    const int left = s.pad_w, right = smaller(2 * half.w, s.pad_w + s.w);  // columns between them have a pixel
    for (int i = 0; i < 2 * half.h; i++) {
      const int y = 2 * p - s.pad_h + i;
      if (y < 0 || y >= s.h) continue;
      const float* from = x + int64_t(y) * s.w * 3;
      float* to = image + int64_t(i / 2) * half.w * PIXEL + i % 2 * 6;
      for (int j = left; j < right; j++, from += 3) memcpy(to + j / 2 * PIXEL + j % 2 * 3, from, 3 * sizeof(float));
    }
  }

  static void conv(const ConvTask<Float32>& task, Team team) {
    const rf_shape& s = task.shape;
    const int64_t high = ceil_div(s.p, FourTaps::OUT);  // rows of tiles
    const Range mine = share(s.n * high, team.thread, team.threads);
    auto row = [&](int64_t tile) { return tile / high * s.p + tile % high * FourTaps::OUT; };
    part(task, {row(mine.begin), row(mine.end)});
  }
};

}  // namespace RF_VARIANT
