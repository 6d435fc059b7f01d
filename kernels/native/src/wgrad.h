// The gradient of a convolution's weight as a matrix product over pixels: dW [K x RSC] = dY^T [K x NPQ] times patches.
//
// The threads copy a chunk of pixels into panels together, in the order in which the register tile reads them, wait for
// each other, and then share the tiles of dW: every sum has one owner and one order, whatever the number of threads.
#pragma once

#include "barrier.h"
#include "outer_product.h"
#include "panels.h"
#include "prologue.h"
#include "work_sharing.h"

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

  // Whether dY has the layout of a left operand already.
  bool in_place() const { return task.shape.k == BLOCK && task.shape.groups == 1; }

  float* left() const { return task.workspace; }
  float* right() const { return left() + task.shape.groups * left_group; }
  int64_t floats() const { return task.shape.groups * (left_group + lines * right_step); }

  void run(Team team, Barrier& barrier) const {
    for (int64_t i = 0; i < chunks; i++) {
      const Range chunk = share(pixels, i, chunks), mine = part(chunk, team);
      pack(mine, chunk.begin);
      barrier.wait(team.threads);
      const Range after = i + 1 < chunks ? part(share(pixels, i + 1, chunks), team) : Range{};
      multiply(chunk, next(after), team);
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
    for (int64_t i = mine.begin; i < mine.end && !in_place(); i++)
      for (int g = 0; g < s.groups; g++)
        put_left(left() + g * left_group, i - first, longest, task.dy + i * s.k + g * rows, rows);
    if (s.c / s.groups % VL == 0)
      each_patch(s, task.x, mine.begin, int(mine.end - mine.begin), [&](int i, const float* image, int y0, int x0) {
        for (int g = 0; g < s.groups; g++)
          put_taps(image, g * (s.c / s.groups), y0, x0, right_at(g, mine.begin - first + i));
      });
    else
      for (int g = 0; g < s.groups; g++) put_patches(g, mine, first);
  }

  // Patches of a group whose channels are not whole vectors. A few at a time are put together and then cut into lines:
  // a line that is read right after its parts were written would wait for them to reach the cache.
  void put_patches(int group, Range mine, int64_t first) const {
    constexpr int TOGETHER = 8;
    const rf_shape& s = task.shape;
    const Patches<Float32> patches{s, task.x, 0, s.groups, task.prologue};
    const int count = int(mine.end - mine.begin);
    float* staging = scratch(ROWS, TOGETHER * lines * VL);
    each_patch(s, task.x, mine.begin, count, [&](int i, const float* image, int y0, int x0) {
      put_patch(patches, group, image, y0, x0, staging + i % TOGETHER * lines * VL);
      if (i % TOGETHER < TOGETHER - 1 && i + 1 < count) return;
      for (int j = i / TOGETHER * TOGETHER; j <= i; j++)
        put_lines<Float32>(right_at(group, mine.begin - first + j), right_step, staging + j % TOGETHER * lines * VL, lines * VL);
    });
  }

  float* right_at(int64_t group, int64_t pixel) const { return right() + group * lines * right_step + pixel * VL; }

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
  void multiply(Range chunk, const NextChunk& next, Team team) const {
    const float* first = in_place() ? task.dy + chunk.begin * BLOCK : left();
    const int64_t count = tiles.count(), panels = ceil_div(columns, NR), per_group = panels * count;
    const Range mine = share(task.shape.groups * per_group, team.thread, team.threads);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t group = i / per_group, column = i % per_group / count * NR;
      const Range part = tiles[i % count];
      if (part.empty()) continue;
      outer(Outer{first + group * left_group + left_offset(part.begin, longest),
                  right_at(group, 0) + column / VL * right_step, right_step, chunk.end - chunk.begin,
                  task.dw + (group * rows + part.begin) * columns + column, columns,
                  int(smaller<int64_t>(NR, columns - column)), chunk.begin > 0,
                  next.part(i - mine.begin, mine.end - mine.begin)},
            int(part.end - part.begin));
    }
  }
};

}  // namespace RF_VARIANT
