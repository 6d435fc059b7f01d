// Grouped convolution with 1, 2, 4 or 8 channels per group, in and out: a vector holds whole groups, so channel c of
// every group is spread over its group's lanes by one shuffle, and every lane multiplies by a weight of its own.
#pragma once

#include <utility>

#include "abi.h"
#include "pool.h"
#include "simd.h"
#include "work.h"

namespace RF_VARIANT {

template <int WIDTH, int CHANNEL> static inline vec spread(vec v) {
  ivec lanes;
  for (int i = 0; i < VL; i++) lanes[i] = i / WIDTH * WIDTH + CHANNEL;
  return __builtin_shuffle(v, lanes);
}

static bool grouped_supports(const rf_shape& s) {
  const int width = s.c / s.groups;
  return s.groups > 1 && s.k == s.c && (width == 1 || width == 2 || width == 4 || width == 8) && width <= VL &&
         s.c % VL == 0 && !s.pool;
}

// Packed weights: [vector of channels][r][s][c within the group][VL].
static int64_t grouped_packed_floats(const rf_shape& s) { return int64_t(s.r) * s.s * (s.c / s.groups) * s.k; }

static void grouped_pack(const rf_shape& s, const double* weight, float* packed) {
  const int width = s.c / s.groups, window = s.r * s.s;
  for (int base = 0; base < s.k; base += VL)
    for (int tap = 0; tap < window; tap++)
      for (int c = 0; c < width; c++)
        for (int lane = 0; lane < VL; lane++)
          *packed++ = float(weight[(int64_t(base + lane) * width + c) * window + tap]);
}

constexpr int STRIP = 4;  // outputs side by side: their sums stay in registers while a weight is used for each

template <int WIDTH, int... CHANNEL>
static inline void accumulate(vec x, const float* w, vec& sum, std::integer_sequence<int, CHANNEL...>) {
  ((sum += spread<WIDTH, CHANNEL>(x) * load(w + CHANNEL * VL)), ...);
}

template <int WIDTH, int COUNT>
static inline void grouped_strip(const rf_shape& s, const float* image, const float* w, int p, int q, vec* total) {
  vec sum[COUNT] = {};
  for (int r = 0; r < s.r; r++) {
    const int y = p * s.stride_h - s.pad_h + r * s.dilation_h;
    if (y < 0 || y >= s.h) continue;
    const float* row = image + int64_t(y) * s.w * s.c;
    for (int t = 0; t < s.s; t++) {
      const float* taps = w + (r * s.s + t) * WIDTH * VL;
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) {
        const int x = (q + i) * s.stride_w - s.pad_w + t * s.dilation_w;
        if (x < 0 || x >= s.w) continue;
        accumulate<WIDTH>(load(row + int64_t(x) * s.c), taps, sum[i], std::make_integer_sequence<int, WIDTH>());
      }
    }
  }
  for (int i = 0; i < COUNT; i++) total[i] = sum[i];
}

template <int WIDTH>
static void grouped_conv(const rf_shape& s, const float* x, const float* packed, const float* shift,
                         const float* residual, float* y, Team team) {
  const int64_t vector_weights = int64_t(s.r) * s.s * WIDTH * VL;
  const Range mine = share(int64_t(s.n) * s.p, team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++) {
    const float* image = x + row / s.p * s.h * s.w * s.c;
    const int p = int(row % s.p);
    for (int base = 0; base < s.k; base += VL) {
      const float* w = packed + base / VL * vector_weights;
      const vec offset = load(shift + base);
      for (int q = 0; q < s.q; q += STRIP) {
        vec sum[STRIP];
        const int count = smaller(STRIP, s.q - q);
        if (count == STRIP)
          grouped_strip<WIDTH, STRIP>(s, image + base, w, p, q, sum);
        else
          for (int i = 0; i < count; i++) grouped_strip<WIDTH, 1>(s, image + base, w, p, q + i, sum + i);
        for (int i = 0; i < count; i++) {
          const int64_t at = (row * s.q + q + i) * s.k + base;
          vec v = sum[i] + offset;
          if (residual) v += load(residual + at);
          store(y + at, s.relu ? relu(v) : v);
        }
      }
    }
  }
}

static void grouped(const rf_shape& s, const float* x, const float* packed, const float* shift, const float* residual,
                    float* y, Team team) {
  switch (s.c / s.groups) {
    case 1: return grouped_conv<1>(s, x, packed, shift, residual, y, team);
    case 2: return grouped_conv<2>(s, x, packed, shift, residual, y, team);
    case 4: return grouped_conv<4>(s, x, packed, shift, residual, y, team);
    case 8: if constexpr (VL >= 8) return grouped_conv<8>(s, x, packed, shift, residual, y, team);
  }
}

}  // namespace RF_VARIANT
