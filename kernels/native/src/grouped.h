// Grouped convolution with 1, 2, 4 or 8 channels per group, in and out: a vector holds whole groups, so channel c of
// every group is spread over its group's lanes by one shuffle, and every lane multiplies by a weight of its own.
#pragma once

#include <utility>

#include "conv.h"
#include "simd.h"
#include "weights.h"
#include "work_sharing.h"

namespace RF_VARIANT {

template <int WIDTH, int CHANNEL> static inline vec spread(vec v) {
#if defined(__clang__)
  vec result;
  for (int i = 0; i < VL; i++) result[i] = v[i / WIDTH * WIDTH + CHANNEL];
  return result;
#else
  ivec lanes;
  for (int i = 0; i < VL; i++) lanes[i] = i / WIDTH * WIDTH + CHANNEL;
  return __builtin_shuffle(v, lanes);
#endif
}

// each(0), each(1), ..., with numbers that are known when it is compiled.
template <class Each, int... NUMBER>
static inline void each_of(Each each, std::integer_sequence<int, NUMBER...>) {
  (each(std::integral_constant<int, NUMBER>()), ...);
}
template <int COUNT, class Each> static inline void each_number(Each each) {
  each_of(each, std::make_integer_sequence<int, COUNT>());
}

static bool grouped_supports(const rf_shape& s) {
  const int width = s.c / s.groups;
  return s.groups > 1 && s.k == s.c && (width == 1 || width == 2 || width == 4 || width == 8) && width <= VL &&
         s.c % VL == 0 && !s.pool;
}

// Packed weights: [vector of channels][r][s][c within the group][VL].
static int64_t grouped_packed_floats(const rf_shape& s) { return int64_t(s.r) * s.s * (s.c / s.groups) * s.k; }

static void grouped_pack(const WeightSource& from, float* packed, Team team) {
  const int width = from.inputs();
  const int64_t count = int64_t(from.taps()) * width;
  auto* block = (double*)rf_scratch(PANELS, count * VL * sizeof(double));
  const Range mine = share(from.shape.k / VL, team.thread, team.threads);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    from.block(int(i * VL), VL, 0, width, block);
    for (int64_t j = 0; j < count; j++) put_weights<Float32>(packed + (i * count + j) * VL, block + j * VL);
  }
}

constexpr int STRIP = 7;  // outputs side by side whose sums stay in registers

// The sums of COUNT outputs of a row, for one vector of channels. Each pixel's channels are spread once and used for all
// the outputs that see it, so with stride 1 a shuffle serves up to S multiply-adds; and the weights of a row of taps,
// for four channels at a time, stay in registers.
template <int WIDTH, int COUNT, int S, int STRIDE>
static inline void grouped_strip(const rf_shape& s, const float* image, const float* w, int p, int q, vec* total) {
  constexpr int AT_ONCE = WIDTH < 4 ? WIDTH : 4;
  vec sum[COUNT] = {};
  const int x0 = q * STRIDE - s.pad_w;
  for (int r = 0; r < s.r; r++, w += S * WIDTH * VL) {
    const int y = p * s.stride_h - s.pad_h + r * s.dilation_h;
    if (y < 0 || y >= s.h) continue;
    const float* row = image + (int64_t(y) * s.w + x0) * s.c;
    each_number<WIDTH / AT_ONCE>([&](auto part) __attribute__((always_inline)) {
      constexpr int FIRST = part.value * AT_ONCE;
      vec weights[S][AT_ONCE];
#pragma GCC unroll 8
      for (int t = 0; t < S; t++)
#pragma GCC unroll 8
        for (int c = 0; c < AT_ONCE; c++) weights[t][c] = load(w + (t * WIDTH + FIRST + c) * VL);
#pragma GCC unroll 16
      for (int j = 0; j < (COUNT - 1) * STRIDE + S; j++) {
        if (x0 + j < 0 || x0 + j >= s.w) continue;
        const vec pixel = load(row + int64_t(j) * s.c);
        each_number<AT_ONCE>([&](auto c) __attribute__((always_inline)) {
          const vec x = spread<WIDTH, FIRST + c.value>(pixel);
#pragma GCC unroll 8
          for (int t = 0; t < S; t++) {
            const int i = (j - t) / STRIDE;
            if (j >= t && (j - t) % STRIDE == 0 && i < COUNT) sum[i] = multiply_add(sum[i], x, weights[t][c.value]);
          }
        });
      }
    });
  }
  for (int i = 0; i < COUNT; i++) total[i] = sum[i];
}

// One output, for any window.
template <int WIDTH>
static inline void grouped_pixel(const rf_shape& s, const float* image, const float* w, int p, int q, vec* total) {
  vec sum{};
  for (int r = 0; r < s.r; r++)
    for (int t = 0; t < s.s; t++, w += WIDTH * VL) {
      const int y = p * s.stride_h - s.pad_h + r * s.dilation_h, x = q * s.stride_w - s.pad_w + t * s.dilation_w;
      if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;
      const vec pixel = load(image + (int64_t(y) * s.w + x) * s.c);
      each_number<WIDTH>([&](auto c) {
        sum = multiply_add(sum, spread<WIDTH, c.value>(pixel), load(w + c.value * VL));
      });
    }
  *total = sum;
}

template <int WIDTH> static void grouped_conv(const ConvTask<Float32>& task, Team team) {
  const rf_shape& s = task.shape;
  const int64_t vector_weights = int64_t(s.r) * s.s * WIDTH * VL;
  const bool strips = s.s == 3 && s.dilation_w == 1 && s.stride_w <= 2;
  const Range mine = share(int64_t(s.n) * s.p, team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++) {
    const float* image = task.x + row / s.p * s.h * s.w * s.c;
    const int p = int(row % s.p);
    for (int base = 0; base < s.k; base += VL) {
      const float* w = task.packed + base / VL * vector_weights;
      const vec offset = load(task.shift + base);
      for (int q = 0; q < s.q;) {
        vec sum[STRIP];
        const int count = strips && s.q - q >= STRIP ? STRIP : 1;
        if (count == 1)
          grouped_pixel<WIDTH>(s, image + base, w, p, q, sum);
        else if (s.stride_w == 1)
          grouped_strip<WIDTH, STRIP, 3, 1>(s, image + base, w, p, q, sum);
        else
          grouped_strip<WIDTH, STRIP, 3, 2>(s, image + base, w, p, q, sum);
        for (int i = 0; i < count; i++, q++) {
          const int64_t at = (row * s.q + q) * s.k + base;
          vec v = sum[i] + offset;
          if (task.residual) v += load(task.residual + at);
          store(task.y + at, s.relu ? relu(v) : v);
        }
      }
    }
  }
}

static void grouped(const ConvTask<Float32>& task, Team team) {
  switch (task.shape.c / task.shape.groups) {
    case 1: return grouped_conv<1>(task, team);
    case 2: return grouped_conv<2>(task, team);
    case 4: return grouped_conv<4>(task, team);
    case 8: if constexpr (VL >= 8) return grouped_conv<8>(task, team);
  }
}

}  // namespace RF_VARIANT
