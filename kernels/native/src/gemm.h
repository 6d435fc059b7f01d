// Convolution as a matrix product over gathered panels; covers every shape, and 1x1 convolutions and linear layers best.
#pragma once

#include "panels.h"
#include "tile.h"
#include "work.h"

namespace RF_VARIANT {

// Packed weights: per group, panels of NR output channels, each [K][NR], the last one [K][VL] if that is enough.
struct GemmWeights {
  int64_t depth, channels;  // K, and output channels, of one group

  explicit GemmWeights(const rf_shape& s)
      : depth(int64_t(s.r) * s.s * (s.c / s.groups)), channels(s.k / s.groups) {}
  int64_t panels() const { return ceil_div(channels, NR); }
  int64_t group_floats() const { return depth * round_up(channels, VL); }
};

static int64_t gemm_packed_floats(const rf_shape& s) { return GemmWeights(s).group_floats() * s.groups; }

static void gemm_pack(const rf_shape& s, const double* weight, float* packed) {
  const GemmWeights layout(s);
  const int cin = s.c / s.groups, window = s.r * s.s;
  for (int g = 0; g < s.groups; g++)
    for (int64_t j = 0; j < layout.panels(); j++) {
      const int64_t left = layout.channels - j * NR;
      const int width = left > VL ? NR : VL;
      for (int tap = 0; tap < window; tap++)
        for (int c = 0; c < cin; c++)
          for (int lane = 0; lane < width; lane++) {
            const int64_t k = g * layout.channels + j * NR + lane;
            *packed++ = lane < left ? float(weight[(k * cin + c) * window + tap]) : 0.0f;
          }
    }
}

// The matrix product for the output pixels `rows` and the panels `columns` of one group.
struct GemmTask {
  const rf_shape& shape;
  const float* x;
  const float* packed;
  const float* shift;
  const float* residual;  // at output pixel 0
  bool relu;
  float* y;       // at output pixel `y_row`
  int64_t y_row;
};

static void gemm_rows(const GemmTask& task, int group, Range rows, Range columns) {
  if (rows.empty() || columns.empty()) return;
  const rf_shape& s = task.shape;
  const GemmWeights layout(s);
  const int cin = s.c / s.groups;
  const Patches patches{s, task.x, cin, group * cin};
  const int64_t lines = ceil_div(layout.depth, VL) * VL;
  const Tiles tiles{rows.end - rows.begin};
  // As many panels at a time as half the cache holds, and at least four: each pass reads all the weights.
  const int64_t fitting = rf_cache_bytes() / 2 / (MR * lines * int64_t(sizeof(float)));
  const int64_t chunk = smaller(tiles.count(), larger<int64_t>(fitting, 4));
  float* panels = (float*)rf_scratch((chunk + 1) * MR * lines * sizeof(float));
  float* staging = panels + chunk * MR * lines;
  const float* group_weights = task.packed + group * layout.group_floats();
  for (int64_t first = 0; first < tiles.count(); first += chunk) {
    const int64_t last = smaller(first + chunk, tiles.count());
    for (int64_t t = first; t < last; t++)
      gather(patches, rows.begin + tiles.begin(t), int(tiles.begin(t + 1) - tiles.begin(t)),
             panels + (t - first) * MR * lines, staging);
    for (int64_t j = columns.begin; j < columns.end; j++) {
      const int64_t channel = group * layout.channels + j * NR;
      for (int64_t t = first; t < last; t++) {
        const int64_t row = rows.begin + tiles.begin(t);
        multiply({panels + (t - first) * MR * lines, group_weights + j * NR * layout.depth, layout.depth,
                  task.y + (row - task.y_row) * s.k + channel, s.k, task.shift + channel,
                  task.residual ? task.residual + row * s.k + channel : nullptr, s.k, task.relu,
                  int(smaller<int64_t>(NR, layout.channels - j * NR))},
                 int(tiles.begin(t + 1) - tiles.begin(t)));
      }
    }
  }
}

static void gemm_conv(const rf_shape& s, const float* x, const float* packed, const float* shift,
                      const float* residual, float* y, Team team) {
  const GemmTask task{s, x, packed, shift, residual, s.relu != 0, y, 0};
  const GemmWeights layout(s);
  const int64_t pixels = int64_t(s.n) * s.p * s.q;
  if (s.groups > 1) {
    // Groups side by side are work of the same size; threads take whole ones, and rows where there are too few.
    const Tiles tiles{pixels};
    const Range mine = share(tiles.count() * s.groups, team.thread, team.threads);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t group = at / tiles.count(), from = at % tiles.count();
      const int64_t to = smaller(tiles.count(), from + mine.end - at);
      gemm_rows(task, int(group), {tiles.begin(from), tiles.begin(to)}, {0, layout.panels()});
      at += to - from;
    }
    return;
  }
  const Tiles tiles{pixels};
  const Grid grid = share_grid(tiles.count(), layout.panels(), 0.3, 0.3, team);
  gemm_rows(task, 0, {tiles.begin(grid.rows.begin), tiles.begin(grid.rows.end)}, grid.columns);
}

}  // namespace RF_VARIANT
