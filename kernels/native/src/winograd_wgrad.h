// The gradient of a 3x3 convolution's weight by Winograd's algorithm: the adjoint of y = A' [(G w G') * (B' x B)] A,
// which is dw = G' [sum over tiles of (A dy A') * (B' x B)] G.
//
// As in wgrad.h, with tiles for pixels and a product for each point: the threads transform a chunk of tiles of dY and x
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
    g[0] = multiply_add(u[0], 0.5f, u[1] + u[2]);
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = multiply_add(u[3], 0.5f, u[1] + u[2]);
  }
};

template <> struct Adjoint<Filter<4, 1>> {
  template <class T> static inline void output(const T (&y)[4], T (&m)[6]) {
    const T a = y[0] + y[2], b = y[1] + y[3], c = multiply_add(y[0], 4, y[2]), e = multiply_add(y[1], 4, y[3]);
    m[0] = y[0];
    m[1] = a + b;
    m[2] = a - b;
    m[3] = multiply_add(c, 2, e);
    m[4] = multiply_add(c, -2, e);
    m[5] = y[3];
  }
  template <class T> static inline void weight(const T (&u)[6], T (&g)[3]) {
    const T a = u[1] + u[2], b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
    g[0] = multiply_add(0.25f * u[0], 1.0f / 24, multiply_add(c, -4, a));
    g[1] = (1.0f / 12) * multiply_add(e, 2, b);
    g[2] = multiply_add(u[5], 1.0f / 6, c - a);
  }
};

// A square of vectors, transformed by columns and then by rows: pixel(i, j) gives the inputs, put(i, j, v) gets the
// results.
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
  static constexpr int64_t LONGEST = 64;  // tiles in a chunk

  const WgradTask& task;
  int64_t tiles_high, tiles_wide, tiles, chunks, longest;
  int64_t blocks, lines, panels;  // of output channels; of VL, and of NR input channels
  int64_t left_point, right_step, right_point;

  explicit WgradWinograd(const WgradTask& task)
      : task(task), tiles_high(ceil_div(task.shape.p, OUT)), tiles_wide(ceil_div(task.shape.q, OUT)),
        tiles(task.shape.n * tiles_high * tiles_wide), chunks(larger<int64_t>(1, ceil_div(tiles, LONGEST))),
        longest(ceil_div(tiles, chunks)), blocks(ceil_div(task.shape.k, BLOCK)), lines(ceil_div(task.shape.c, VL)),
        panels(ceil_div(lines, NV)), left_point(odd_lines(blocks * longest * BLOCK)),
        right_step(odd_lines(longest * VL)), right_point(odd_lines(lines * right_step)) {}

  static bool supports(const rf_shape& s) {
    return s.r == TAPS && s.s == TAPS && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
           s.groups == 1;
  }

  float* left() const { return task.workspace; }
  float* right() const { return left() + POINTS * left_point; }
  int64_t floats() const { return POINTS * (left_point + right_point); }

  void run(Team team, Barrier& barrier) const {
    for (int64_t i = 0; i < chunks; i++) {
      const Range chunk = share(tiles, i, chunks), mine = part(chunk, team);
      for (int64_t tile = mine.begin; tile < mine.end; tile++) transform(tile, tile - chunk.begin);
      barrier.wait(team.threads);
      const Range after = i + 1 < chunks ? part(share(tiles, i + 1, chunks), team) : Range{};
      multiply(chunk.end - chunk.begin, i > 0, next(after), team);
      barrier.wait(team.threads);
    }
  }

  NextChunk next(Range mine) const {
    const rf_shape& s = task.shape;
    if (mine.empty()) return {};
    return {Next::of(task.dy, int64_t(s.n) * s.p * s.q * s.k, mine, tiles),
            Next::of(task.x, int64_t(s.n) * s.h * s.w * s.c, mine, tiles)};
  }

  // Tile number `tile` of all, `at` of the chunk.
  void transform(int64_t tile, int64_t at) const {
    const rf_shape& s = task.shape;
    const Square dy = square(task.dy, s.p, s.q, s.k, tile, 0, 0);
    const Square x = square(task.x, s.h, s.w, s.c, tile, s.pad_h, s.pad_w);
    auto spread = [](auto& from, auto& to) __attribute__((always_inline)) { Adjoint<F>::output(from, to); };
    auto input = [](auto& from, auto& to) __attribute__((always_inline)) { F::input(from, to); };
    auto rows = [&](int channel) { return left() + left_offset(channel, longest) + at * BLOCK; };
    auto columns = [&](int channel) { return right() + channel / VL * right_step + at * VL; };
    transform<OUT, false>(dy, {}, spread, rows, left_point);
    if (task.prologue)
      transform<IN, true>(x, task.prologue, input, columns, right_point);
    else
      transform<IN, false>(x, {}, input, columns, right_point);
  }

  // Pixels of an image, from row y, column x on.
  struct Square {
    const float *corner, *next;  // next: the one of the next tile, to be fetched meanwhile
    int height, width, channels, y, x;

    bool inside(int i, int j) const { return y + i >= 0 && y + i < height && x + j >= 0 && x + j < width; }
    int64_t offset(int i, int j) const { return (int64_t(i) * width + j) * channels; }
  };
  Square square(const float* images, int height, int width, int channels, int64_t tile, int pad_h, int pad_w) const {
    Square square{nullptr, nullptr, height, width, channels, 0, 0};
    auto corner = [&](int64_t tile) {
      const int64_t image = tile / (tiles_high * tiles_wide), at = tile % (tiles_high * tiles_wide);
      square.y = int(at / tiles_wide) * OUT - pad_h, square.x = int(at % tiles_wide) * OUT - pad_w;
      return images + image * height * width * channels + square.offset(square.y, square.x);
    };
    square.next = corner(tile + 1);
    square.corner = corner(tile);
    return square;
  }

  // Transforms SIDE x SIDE pixels, 0 outside the image, to POINTS points, which lie `point` floats apart, the first one
  // of the channels from `channel` on at place(channel).
  template <int SIDE, bool ACTIVATED, class Transform, class Place>
  static void transform(const Square& from, Prologue by, Transform transform, Place place, int64_t point) {
    const bool inside = from.inside(0, 0) && from.inside(SIDE - 1, SIDE - 1);
    for (int c = 0; c < from.channels; c += VL) {
      float* to = place(c);
      const int count = smaller(VL, from.channels - c);
      const vec scale = ACTIVATED ? load_some<Float32>(by.scale + c, count) : vec{};
      const vec shift = ACTIVATED ? load_some<Float32>(by.shift + c, count) : vec{};
      auto pixel = [&](int i, int j, int count) __attribute__((always_inline)) {
        __builtin_prefetch(from.next + from.offset(i, j) + c);
        const vec x = load_some<Float32>(from.corner + from.offset(i, j) + c, count);
        return ACTIVATED ? activated(x, scale, shift) : x;
      };
      auto put = [&](int i, int j, vec v) __attribute__((always_inline)) { store(to + (i * IN + j) * point, v); };
      if (inside && count == VL)
        transform_square<SIDE, IN>(
            transform, [&](int i, int j) __attribute__((always_inline)) { return pixel(i, j, VL); }, put);
      else
        transform_square<SIDE, IN>(
            transform,
            [&](int i, int j) __attribute__((always_inline)) {
              return from.inside(i, j) ? pixel(i, j, count) : vec{};
            },
            put);
    }
  }

  void multiply(int64_t size, bool add, const NextChunk& next, Team team) const {
    const Range mine = share(blocks * panels, team.thread, team.threads);
    const int64_t count = mine.end - mine.begin;
    for (int64_t i = 0; i < count; i++) {
      const int64_t block = (mine.begin + i) / panels, panel = (mine.begin + i) % panels;
      multiply(block, panel, size, add, {next.dy.part(i, count), next.x.part(i, count)});
    }
  }

  // The gradients of a block of output channels and a panel of input channels, from `size` tiles.
  void multiply(int64_t block, int64_t panel, int64_t size, bool add, const NextChunk& next) const {
    const rf_shape& s = task.shape;
    const int64_t channel = block * BLOCK;
    const Tiles parts{smaller<int64_t>(BLOCK, s.k - channel)};
    const int width = panel * NV + 1 < lines ? NR : VL;
    const int64_t point_step = odd_lines(parts.rows * NR);
    float* products = scratch(ROWS, POINTS * point_step);
    for (int point = 0; point < POINTS; point++)
      for (int64_t i = 0; i < parts.count(); i++) {
        const int64_t first = parts.begin(i);
        outer(Outer{left() + point * left_point + left_offset(channel + first, longest),
                    right() + point * right_point + panel * NV * right_step, right_step, size,
                    products + point * point_step + first * NR, NR, width, false,
                    next.part(point * parts.count() + i, POINTS * parts.count())},
              int(parts.begin(i + 1) - first));
      }
    for (int64_t i = 0; i < parts.rows; i++)
      for (int c = 0; c < width; c += VL) {
        const int64_t from_channel = panel * NR + c;
        const int count = int(smaller<int64_t>(VL, s.c - from_channel));
        const float* from = products + i * NR + c;
        float* to = task.dw + (channel + i) * TAPS * TAPS * s.c + from_channel;
        transform_back(from, point_step, [&](int tap, vec v) __attribute__((always_inline)) {
          float* at = to + tap * s.c;
          __builtin_prefetch(at + TAPS * TAPS * s.c, 1);  // of the next row
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
