// Convolution as a matrix product over gathered panels; covers every shape, and 1x1 convolutions and linear layers best.
#pragma once

#include "conv.h"
#include "panels.h"
#include "register_tile.h"
#include "weights.h"
#include "work_sharing.h"

namespace RF_VARIANT {

// Packed weights: per group, panels of NR output channels, each [E::START_ROWS + K][NR] units, the last one with VL in
// place of NR if that is enough. A patch is one run of elements, or one for each of its rows; each begins a unit.
template <class E> struct GemmWeights {
  int64_t run, runs, run_units, depth, channels;  // elements of a run; all runs, K; output channels of one group

  explicit GemmWeights(const rf_shape& s, bool by_rows = false)
      : run(patch_elements(s) / (by_rows ? s.r : 1)), runs(by_rows ? s.r : 1), run_units(ceil_div(run, E::PER_UNIT)),
        depth(runs * run_units), channels(s.k / s.groups) {}
  int64_t panels() const { return ceil_div(channels, NR); }
  int64_t rows() const { return E::START_ROWS + depth; }
  int64_t group_units() const { return rows() * round_up(channels, VL); }
};

template <class E> static int64_t gemm_packed_bytes(const rf_shape& s, bool by_rows = false) {
  return GemmWeights<E>(s, by_rows).group_units() * s.groups * int64_t(sizeof(typename E::Packed));
}

template <class E> static void gemm_pack(const WeightSource& from, void* packed, Team team, bool by_rows = false) {
  const rf_shape& s = from.shape;
  const GemmWeights<E> layout(s, by_rows);
  const int64_t vectors = ceil_div(layout.channels, VL);
  const int inputs = from.inputs();
  auto* block = (double*)rf_scratch(PANELS, from.block_doubles() * sizeof(double));
  const Range mine = share(s.groups * vectors, team.thread, team.threads);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t group = i / vectors, channel = i % vectors * VL, panel = channel / NR * NR;
    const int lanes = int(smaller<int64_t>(VL, layout.channels - channel));
    const int width = layout.channels - panel > VL ? NR : VL;
    const int64_t first = group * layout.group_units() + panel * layout.rows() + channel - panel;
    auto row = [&](int64_t run, int64_t element) {
      const int64_t unit = first + (E::START_ROWS + run * layout.run_units + element / E::PER_UNIT) * width;
      return (typename E::Element*)packed + unit * E::PER_UNIT + element % E::PER_UNIT;
    };
    int32_t sums[VL] = {};
    for (int c = 0; c < inputs; c += from.CHUNK) {
      const int count = smaller(from.CHUNK, inputs - c);
      from.block(int(group * layout.channels + channel), lanes, c, count, block);
      const double* at = block;
      for (int tap = 0; tap < from.taps(); tap++)
        for (int j = 0; j < count; j++, at += VL) {
          const int64_t element = int64_t(tap) * inputs + c + j;
          put_weights<E>(row(element / layout.run, element % layout.run), at);
          for (int lane = 0; E::START_ROWS && lane < VL; lane++) sums[lane] += int32_t(at[lane]);
        }
    }
    for (int64_t run = 0; run < layout.runs; run++)
      for (int64_t i = layout.run; i % E::PER_UNIT; i++)
        for (int lane = 0; lane < VL; lane++) row(run, i)[lane * E::PER_UNIT] = 0;
    for (int lane = 0; E::START_ROWS && lane < VL; lane++) ((int32_t*)packed)[first + lane] = -128 * sums[lane];
  }
}

// The matrix product for some groups, output pixels (`rows`) and panels of output channels (`columns`).
template <class E> static void gemm_part(const ConvTask<E>& task, Range groups, Range rows, Range columns) {
  if (groups.empty() || rows.empty() || columns.empty()) return;
  const rf_shape& s = task.shape;
  const GemmWeights<E> weights(s);
  const int64_t group_count = groups.end - groups.begin;
  const Patches<E> patches{s, task.x, int(groups.begin), int(group_count), task.prologue};
  const Tiles tiles{rows.end - rows.begin};
  // As many tiles at a time as half the cache holds, and at least four: each pass reads all the weights.
  const int64_t pitch = MR * patches.lines() * VL, tile_pitch = pitch * group_count;
  const int64_t fitting = rf_cache_bytes() / 2 / (tile_pitch * int64_t(sizeof(float)));
  const int64_t chunk = smaller(tiles.count(), larger<int64_t>(fitting, group_count > 1 ? 1 : 4));
  float* panels = scratch(PANELS, chunk * tile_pitch + pitch);
  alignas(sizeof(vec)) typename E::Element apart[MR * NR];  // a tile whose pixels are not side by side in the image
  float* staging = panels + chunk * tile_pitch;
  for (int64_t first = 0; first < tiles.count(); first += chunk) {
    const int64_t last = smaller(first + chunk, tiles.count());
    for (int64_t t = first; t < last; t++)
      gather(patches, rows.begin + tiles.begin(t), int(tiles.begin(t + 1) - tiles.begin(t)),
             panels + (t - first) * tile_pitch, pitch, staging);
    for (int64_t g = groups.begin; g < groups.end; g++)
      for (int64_t j = columns.begin; j < columns.end; j++) {
        const int64_t channel = g * weights.channels + j * NR;
        const int channels = int(smaller<int64_t>(NR, weights.channels - j * NR));
        const bool more = j + 1 < columns.end;
        const auto* right = task.packed + g * weights.group_units() + j * NR * weights.rows();
        const auto* next = more ? right + NR * weights.rows() : nullptr;
        auto residual = [&](int64_t tile, int64_t at) {
          return task.residual ? task.residual + (rows.begin + tiles.begin(tile)) * s.k + at : nullptr;
        };
        for (int64_t t = first; t < last; t++) {
          const int64_t row = rows.begin + tiles.begin(t);
          const int height = int(tiles.begin(t + 1) - tiles.begin(t));
          const float* left = panels + (t - first) * tile_pitch + (g - groups.begin) * pitch;
          const auto* next_residual = t + 1 < last ? residual(t + 1, channel)
                                      : more     ? residual(first, channel + NR)
                                                 : nullptr;
          const bool spread = task.spread.h;
          auto* y = spread ? apart : task.y_at((row - task.y_row) * s.k + channel);
          multiply(Tile<E>{panel(left, height, weights.depth), right, y, spread ? NR : s.k, task.shift + channel,
                           residual(t, channel), s.relu != 0, channels, Ahead::share(next, t - first, last - first),
                           next_residual, task.requantise.from(channel)},
                   height);
          for (int i = 0; spread && i < height; i++)
            copy(task.y + task.spread.pixel(s, row + i) * s.k + channel, y + i * NR, channels);
        }
      }
  }
}

template <class E> static void gemm_conv(const ConvTask<E>& task, Team team) {
  const rf_shape& s = task.shape;
  const int64_t panels = GemmWeights<E>(s).panels();
  const Tiles tiles{int64_t(s.n) * s.p * s.q};
  // Columns are groups, or the panels of the only one.
  const Grid grid = share_grid(tiles.count(), s.groups > 1 ? s.groups : panels, team);
  const Range rows{tiles.begin(grid.rows.begin), tiles.begin(grid.rows.end)};
  if (s.groups > 1)
    gemm_part(task, grid.columns, rows, {0, panels});
  else
    gemm_part(task, {0, 1}, rows, grid.columns);
}

}  // namespace RF_VARIANT
