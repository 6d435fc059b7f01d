// The gradient of a convolution's weight as a matrix product over pixels: dW [K x RSC] = dY^T [K x NPQ] times patches of x.
//
// The threads copy a chunk of pixels into panels together, in the order in which the register tile reads them, wait for
// each other, and then share the tiles of dW: every sum has one owner and one order, whatever the number of threads.
#pragma once

#include "barrier.h"
#include "outer.h"
#include "panels.h"
#include "prologue.h"
#include "work.h"

namespace RF_VARIANT {

struct WgradTask {
  const rf_shape& shape;
  const float *dy, *x;
  Prologue prologue;
  float* dw;  // [K][R][S][C / groups]
  float* workspace;
};

struct WgradGemm {
  // Long enough to hide what a tile costs to start and to add up, short enough for a panel to stay in the first-level
  // cache, and for a chunk of dY in the second.
  static constexpr int64_t LONGEST = 256;

  const WgradTask& task;
  int64_t pixels, chunks, longest;  // of output; chunks, and how long they are at most
  int64_t rows, columns, lines;     // of dW, of one group; lines: of VL columns
  BlockTiles tiles;
  int64_t left_group, right_step;

  explicit WgradGemm(const WgradTask& task)
      : task(task), pixels(int64_t(task.shape.n) * task.shape.p * task.shape.q),
        chunks(larger<int64_t>(1, ceil_div(pixels, LONGEST))), longest(ceil_div(pixels, chunks)),
        rows(task.shape.k / task.shape.groups), columns(patch_elements(task.shape)), lines(ceil_div(columns, VL)),
        tiles{rows}, left_group(tiles.blocks() * BLOCK * longest), right_step(odd_lines(longest * VL)) {}

  float* left() const { return task.workspace; }
  float* right() const { return left() + task.shape.groups * left_group; }
  int64_t floats() const { return task.shape.groups * (left_group + lines * right_step); }

  void run(Team team, Barrier& barrier) const {
    for (int64_t i = 0; i < chunks; i++) {
      const Range chunk = share(pixels, i, chunks), mine = part(chunk, team);
      pack(mine, chunk.begin);
      barrier.wait(team.threads);
      const Range after = i + 1 < chunks ? part(share(pixels, i + 1, chunks), team) : Range{};
      multiply(chunk.end - chunk.begin, i > 0, next(after), team);
      barrier.wait(team.threads);
    }
  }

  NextChunk next(Range mine) const {
    const rf_shape& s = task.shape;
    if (mine.empty()) return {};
    const bool gaps = s.stride_h > s.r;  // between the rows that are read
    return {Next::of(task.dy, pixels * s.k, mine, pixels),
            gaps ? Next{} : Next::of(task.x, int64_t(s.n) * s.h * s.w * s.c, mine, pixels)};
  }

  // Some pixels of the chunk that begins with pixel `first`.
  void pack(Range mine, int64_t first) const {
    const rf_shape& s = task.shape;
    for (int64_t i = mine.begin; i < mine.end; i++)
      for (int g = 0; g < s.groups; g++)
        put_left(left() + g * left_group, i - first, longest, task.dy + i * s.k + g * rows, rows);
    const int channels = s.c / s.groups;
    const Patches<Float32> patches{s, task.x, 0, s.groups, task.prologue};
    float* staging = channels % VL ? scratch(ROWS, lines * VL) : nullptr;
    each_patch(s, task.x, mine.begin, int(mine.end - mine.begin), [&](int i, const float* image, int y0, int x0) {
      float* to = right() + (mine.begin - first + i) * VL;
      for (int g = 0; g < s.groups; g++, to += lines * right_step)
        if (staging) {
          put_patch(patches, g, image, y0, x0, staging);
          put_lines(to, right_step, staging, lines * VL);
        } else {
          put_taps(image, g * channels, y0, x0, to);
        }
    });
  }

  // A patch of one group whose channels are whole vectors, from channel `channel` on. Padding is 0 after the prologue.
  void put_taps(const float* image, int channel, int y0, int x0, float* to) const {
    const rf_shape& s = task.shape;
    const int channels = s.c / s.groups;
    for (int r = 0; r < s.r; r++) {
      const int y = y0 + r * s.dilation_h;
      for (int t = 0; t < s.s; t++) {
        const int x = x0 + t * s.dilation_w;
        const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
        const float* pixel = image + (int64_t(y) * s.w + x) * s.c;
        for (int c = channel; c < channel + channels; c += VL, to += right_step)
          store(to, inside ? task.prologue(pixel, c, VL) : vec{});
      }
    }
  }

  // Tiles of dW, those of a panel of columns one after the other: it stays in the first-level cache meanwhile.
  void multiply(int64_t size, bool add, const NextChunk& next, Team team) const {
    const int64_t count = tiles.count(), panels = ceil_div(columns, NR), per_group = panels * count;
    const Range mine = share(task.shape.groups * per_group, team.thread, team.threads);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t group = i / per_group, column = i % per_group / count * NR;
      const Range part = tiles[i % count];
      if (part.empty()) continue;
      outer(Outer{left() + group * left_group + left_offset(part.begin, longest),
                  right() + (group * lines + column / VL) * right_step, right_step, size,
                  task.dw + (group * rows + part.begin) * columns + column, columns,
                  int(smaller<int64_t>(NR, columns - column)), add, next.part(i - mine.begin, mine.end - mine.begin)},
            int(part.end - part.begin));
    }
  }
};

}  // namespace RF_VARIANT
