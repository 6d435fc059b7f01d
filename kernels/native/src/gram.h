// Mean and covariance of the channels of an image: the weight gradient's matrix product, with the centred pixels on both sides.
#pragma once

#include "wgrad.h"

namespace RF_VARIANT {

typedef double doubles __attribute__((vector_size(VL * 8), aligned(8), may_alias));

struct GramTask {
  const rf_shape& shape;  // a 1x1 convolution's: its output pixels are those that count
  const float* x;
  Prologue prologue;
  float *mean, *covariance;  // [C], [C][C]
  float* workspace;
};

// Deviations from the mean are multiplied, not values: a mean much larger than they are would take their digits. Its own
// rounding changes the covariance by its square only.
struct Gram {
  static constexpr int64_t LONGEST = WgradGemm::LONGEST;

  const GramTask& task;
  int64_t pixels, chunks, longest, lines, right_step;
  BlockTiles tiles;

  explicit Gram(const GramTask& task)
      : task(task), pixels(int64_t(task.shape.n) * task.shape.p * task.shape.q), chunks(larger<int64_t>(1, ceil_div(pixels, LONGEST))),
        longest(ceil_div(pixels, chunks)), lines(ceil_div(task.shape.c, VL)), right_step(odd_lines(longest * VL)),
        tiles{task.shape.c} {}

  float* left() const { return task.workspace; }
  float* right() const { return left() + tiles.blocks() * BLOCK * longest; }
  double* totals(int64_t chunk) const { return (double*)(right() + lines * right_step) + chunk * lines * VL; }
  int64_t floats() const { return (float*)totals(chunks) - left(); }

  void run(Team team, Barrier& barrier) const {
    const Range mine = share(chunks, team.thread, team.threads);
    for (int64_t i = mine.begin; i < mine.end; i++) add_up(share(pixels, i, chunks), totals(i));
    barrier.wait(team.threads);
    const Range channels = share(task.shape.c, team.thread, team.threads);
    for (int64_t c = channels.begin; c < channels.end; c++) {
      double total = 0;
      for (int64_t i = 0; i < chunks; i++) total += totals(i)[c];
      task.mean[c] = float(total / double(pixels));
    }
    barrier.wait(team.threads);
    for (int64_t i = 0; i < chunks; i++) {
      const Range chunk = share(pixels, i, chunks);
      centre(part(chunk, team), chunk.begin);
      barrier.wait(team.threads);
      multiply(chunk.end - chunk.begin, i > 0, team);
      barrier.wait(team.threads);
    }
    finish(team);
  }

  // Calls use(i, pixel) for the pixels of a range, counted from its begin.
  template <class Use> void each_pixel(Range range, Use use) const {
    const rf_shape& s = task.shape;
    each_patch(s, task.x, range.begin, int(range.end - range.begin), [&](int i, const float* image, int y, int x) {
      use(i, image + (int64_t(y) * s.w + x) * s.c);
    });
  }
  int valid(int64_t line) const { return int(smaller<int64_t>(VL, task.shape.c - line * VL)); }

  void add_up(Range range, double* total) const {
    memset(total, 0, lines * VL * sizeof *total);
    each_pixel(range, [&](int, const float* pixel) {
      for (int64_t line = 0; line < lines; line++) {
        const vec v = task.prologue(pixel, line * VL, valid(line));
        *(doubles*)(total + line * VL) += __builtin_convertvector(v, doubles);
      }
    });
  }

  // Some pixels of the chunk that begins with pixel `first`.
  void centre(Range mine, int64_t first) const {
    each_pixel(mine, [&](int i, const float* pixel) {
      const int64_t at = mine.begin - first + i;
      float* to = right() + at * VL;
      for (int64_t line = 0; line < lines; line++, to += right_step) {
        const int count = valid(line);
        const vec v = task.prologue(pixel, line * VL, count) - load_some<Float32>(task.mean + line * VL, count);
        store(left() + left_offset(line * VL, longest) + at * BLOCK, v);
        store(to, v);
      }
    });
  }

  // The tiles that touch the diagonal or lie above it. The threads take turns: panels have more of them to the right.
  void multiply(int64_t size, bool add, Team team) const {
    const int channels = task.shape.c;
    const int64_t count = tiles.count();
    for (int64_t i = team.thread; i < ceil_div(channels, NR) * count; i += team.threads) {
      const int64_t column = i / count * NR;
      const Range rows = tiles[i % count];
      if (rows.empty() || rows.begin >= column + NR) continue;
      outer(Outer{left() + left_offset(rows.begin, longest), right() + column / VL * right_step, right_step, size,
                  task.covariance + rows.begin * channels + column, channels, int(smaller<int64_t>(NR, channels - column)),
                  add, {}},
            int(rows.end - rows.begin));
    }
  }

  // From sums above the diagonal to means on both sides.
  void finish(Team team) const {
    const int64_t channels = task.shape.c;
    for (int64_t i = team.thread; i < channels; i += team.threads)
      for (int64_t j = i; j < channels; j++) {
        float& above = task.covariance[i * channels + j];
        above = task.covariance[j * channels + i] = above / float(pixels);
      }
  }
};

}  // namespace RF_VARIANT
