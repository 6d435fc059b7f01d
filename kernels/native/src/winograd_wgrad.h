// The gradient of a 3x3 convolution's weight by Winograd's algorithm: the adjoint of y = A' [(G w G') * (B' x B)] A, which is
// dw = G' [sum over tiles of (A dy A') * (B' x B)] G.
//
// As in wgrad.h, with tiles for pixels and a product for each point: the threads transform a chunk of tiles of dY and of x
// together, and then share blocks of dW. The products of a block for a chunk are transformed back at once, and added to
// dW: sums for all the points would be four times as much to read and write.
#pragma once

#include "wgrad.h"
#include "winograd_filters.h"

namespace RF_VARIANT {

// The adjoints of a filter's output and weight transforms.
template <class F> struct Adjoint;

template <> struct Adjoint<Filter<2, 1>> {
  template <class T> static inline void output(const T (&y)[2], T (&m)[4]) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = 0.0f - y[1];
  }
  template <class T> static inline void weight(const T (&u)[4], T (&g)[3]) {
    g[0] = u[0] + 0.5f * (u[1] + u[2]);
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = 0.5f * (u[1] + u[2]) + u[3];
  }
};

template <> struct Adjoint<Filter<4, 1>> {
  template <class T> static inline void output(const T (&y)[4], T (&m)[6]) {
    const T a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4.0f * y[2], e = 2.0f * y[1] + 8.0f * y[3];
    m[0] = y[0];
    m[1] = a + b;
    m[2] = a - b;
    m[3] = c + e;
    m[4] = c - e;
    m[5] = y[3];
  }
  template <class T> static inline void weight(const T (&u)[6], T (&g)[3]) {
    const T a = u[1] + u[2], b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
    g[0] = 0.25f * u[0] + (1.0f / 24) * (c - 4.0f * a);
    g[1] = (1.0f / 12) * (e + 2.0f * b);
    g[2] = (1.0f / 6) * (c - a) + u[5];
  }
};

// A square of vectors, transformed by columns and then by rows: pixel(i, j) gives the inputs, put(i, j, v) gets the results.
template <int IN, int OUT, class Transform, class Pixel, class Put>
static inline __attribute__((always_inline)) void transform_square(Transform transform, Pixel pixel, Put put) {
  vec half[OUT][IN];
#pragma GCC unroll 6
  for (int j = 0; j < IN; j++) {
    vec from[IN], to[OUT];
#pragma GCC unroll 6
    for (int i = 0; i < IN; i++) from[i] = pixel(i, j);
    transform(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < OUT; i++) half[i][j] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < OUT; i++) {
    vec to[OUT];
    transform(half[i], to);
#pragma GCC unroll 6
    for (int j = 0; j < OUT; j++) put(i, j, to[j]);
  }
}

template <class F> struct WgradWinograd {
  static constexpr int IN = F::IN, OUT = F::OUT, TAPS = F::TAPS, POINTS = IN * IN;
  static constexpr int64_t LONGEST = 64;   // tiles in a chunk
  static constexpr int64_t BLOCK = 5;      // register tiles of rows in a block: a panel of x is read once for them

  const WgradTask& task;
  int64_t tiles_high, tiles_wide, tiles, chunks, longest;
  int64_t left_step, left_point, lines, right_step, right_point;  // steps from point to point
  int64_t blocks, panels;

  explicit WgradWinograd(const WgradTask& task)
      : task(task), tiles_high(ceil_div(task.shape.p, OUT)), tiles_wide(ceil_div(task.shape.q, OUT)),
        tiles(task.shape.n * tiles_high * tiles_wide), chunks(larger<int64_t>(1, ceil_div(tiles, LONGEST))),
        longest(ceil_div(tiles, chunks)), left_step(odd_lines(task.shape.k)), left_point(odd_lines(longest * left_step)),
        lines(ceil_div(task.shape.c, VL)), right_step(odd_lines(longest * VL)), right_point(odd_lines(lines * right_step)),
        blocks(ceil_div(task.shape.k, BLOCK * MR)), panels(ceil_div(lines, NV)) {}

  float* left() const { return task.workspace; }
  float* right() const { return left() + POINTS * left_point; }
  int64_t floats() const { return POINTS * (left_point + right_point); }

  void run(Team team, Barrier& barrier) const {
    for (int64_t i = 0; i < chunks; i++) {
      const Range chunk = share(tiles, i, chunks), part = share(chunk.end - chunk.begin, team.thread, team.threads);
      for (int64_t tile = part.begin; tile < part.end; tile++) transform(chunk.begin + tile, tile);
      barrier.wait(team.threads);
      const Range mine = share(blocks * panels, team.thread, team.threads);
      for (int64_t item = mine.begin; item < mine.end; item++)
        multiply(share(task.shape.k, item % blocks, blocks), item / blocks, chunk.end - chunk.begin, i > 0);
      barrier.wait(team.threads);
    }
  }

  // Tile number `tile` of all, `at` of the chunk.
  void transform(int64_t tile, int64_t at) const {
    const rf_shape& s = task.shape;
    const int64_t image = tile / (tiles_high * tiles_wide), place = tile % (tiles_high * tiles_wide);
    const int p = int(place / tiles_wide) * OUT, q = int(place % tiles_wide) * OUT;
    square<OUT>(task.dy + image * s.p * s.q * s.k, s.p, s.q, s.k, p, q, {nullptr, nullptr},
                [](auto& from, auto& to) __attribute__((always_inline)) { Adjoint<F>::output(from, to); },
                left() + at * left_step, VL, left_point);
    square<IN>(task.x + image * s.h * s.w * s.c, s.h, s.w, s.c, p - s.pad_h, q - s.pad_w, task.prologue,
               [](auto& from, auto& to) __attribute__((always_inline)) { F::input(from, to); },
               right() + at * VL, right_step, right_point);
  }

  // Transforms SIDE x SIDE pixels of an image, 0 outside it, to POINTS points, which lie `point` floats apart; lines of
  // channels lie `step` floats apart.
  template <int SIDE, class Transform>
  static void square(const float* image, int height, int width, int channels, int y0, int x0, const Prologue& prologue,
                     Transform transform, float* to, int64_t step, int64_t point) {
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + SIDE <= height && x0 + SIDE <= width;
    const float* corner = image + (int64_t(y0) * width + x0) * channels;
    for (int c = 0; c < channels; c += VL, to += step) {
      const int count = smaller(VL, channels - c);
      auto pixel = [&](int i, int j) __attribute__((always_inline)) {
        return prologue(corner + (int64_t(i) * width + j) * channels, c, count);
      };
      auto put = [&](int i, int j, vec v) __attribute__((always_inline)) { store(to + (i * IN + j) * point, v); };
      if (inside && count == VL)
        transform_square<SIDE, IN>(transform, pixel, put);
      else
        transform_square<SIDE, IN>(
            transform,
            [&](int i, int j) __attribute__((always_inline)) {
              const bool there = y0 + i >= 0 && y0 + i < height && x0 + j >= 0 && x0 + j < width;
              return there ? pixel(i, j) : vec{};
            },
            put);
    }
  }

  // The gradients of some output channels (`rows`) and a panel of input channels, from `size` tiles.
  void multiply(Range rows, int64_t panel, int64_t size, bool add) const {
    const rf_shape& s = task.shape;
    const Tiles parts{rows.end - rows.begin};
    const int width = panel * NV + 1 < lines ? NR : VL;
    const int64_t point_step = odd_lines(parts.rows * NR);
    float* products = scratch(ROWS, POINTS * point_step);
    for (int point = 0; point < POINTS; point++)
      for (int64_t i = 0; i < parts.count(); i++) {
        const int64_t first = parts.begin(i);
        outer(Outer{left() + point * left_point + rows.begin + first, left_step,
                    right() + point * right_point + panel * NV * right_step, right_step, size,
                    products + point * point_step + first * NR, NR, width, false},
              int(parts.begin(i + 1) - first));
      }
    for (int64_t i = 0; i < parts.rows; i++)
      for (int c = 0; c < width; c += VL) {
        const int64_t channel = panel * NR + c;
        const int count = int(smaller<int64_t>(VL, s.c - channel));
        const float* from = products + i * NR + c;
        float* to = task.dw + (rows.begin + i) * TAPS * TAPS * s.c + channel;
        transform_back(from, point_step, [&](int tap, vec v) __attribute__((always_inline)) {
          float* at = to + tap * s.c;
          store_some<Float32>(at, add ? load_some<Float32>(at, count) + v : v, count);
        });
      }
  }

  template <class Put> static void transform_back(const float* from, int64_t point_step, Put put) {
    transform_square<IN, TAPS>(
        [](auto& u, auto& g) __attribute__((always_inline)) { Adjoint<F>::weight(u, g); },
        [&](int i, int j) __attribute__((always_inline)) { return load(from + (i * IN + j) * point_step); },
        [&](int i, int j, vec v) __attribute__((always_inline)) { put(i * TAPS + j, v); });
  }
};

}  // namespace RF_VARIANT
