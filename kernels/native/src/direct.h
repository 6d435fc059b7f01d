// Convolution of an RGB image with horizontal stride 2, the stem of every ResNet: too few channels to gather by vectors,
// but the patches of neighbouring outputs lie 6 floats apart, so the register tile reads them where they are.
#pragma once

#include "gemm.h"

namespace RF_VARIANT {

constexpr int RGB_STEP = 6;  // elements from one patch to the next: 3 channels, every other pixel

static bool direct_supports(const rf_shape& s) {
  return s.c == 3 && s.stride_w == 2 && s.groups == 1 && s.dilation_w == 1;
}

constexpr int DIRECT_ROWS = 8;  // output rows at a time, for which the image's rows are copied between zeros

// The output rows `rows`, counted over all images. Packed weights are those of the matrix product, by rows.
template <class E> static void direct_part(const ConvTask<E>& task, Range rows) {
  using Placed = typename E::Placed;
  const rf_shape s = task.shape;
  const GemmWeights<E> weights(s, true);
  constexpr int STEP = RGB_STEP * sizeof(Placed);
  const int64_t padded = int64_t(s.q - 1) * 2 + s.s;
  // A last unit may end beyond its run, in elements that are multiplied by 0.
  const int64_t pitch = round_up(larger<int64_t>(padded, s.w + s.pad_w) * 3 + E::PER_UNIT, PANEL_STEP / sizeof(Placed));
  const int extent = (s.r - 1) * s.dilation_h + 1;
  auto* image = (Placed*)scratch(IMAGE, ((DIRECT_ROWS - 1) * s.stride_h + extent) * pitch * sizeof(Placed) / UNIT);
  const Tiles tiles{s.q};
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t number = row / s.p, p = row % s.p;
    const int count = int(smaller(smaller<int64_t>(DIRECT_ROWS, s.p - p), rows.end - row));
    const int64_t top = p * s.stride_h - s.pad_h;
    for (int i = 0; i < (count - 1) * s.stride_h + extent; i++) {
      Placed* to = image + i * pitch;
      for (int64_t j = 0; j < pitch; j++) to[j] = E::placed(0);
      if (top + i < 0 || top + i >= s.h) continue;
      const auto* from = task.x + (number * s.h + top + i) * s.w * 3;
      for (int64_t j = 0; j < int64_t(s.w) * 3; j++) to[s.pad_w * 3 + j] = E::placed(from[j]);
    }
    for (int64_t j = 0; j < weights.panels(); j++)
      for (int i = 0; i < count; i++)
        for (int64_t t = 0; t < tiles.count(); t++) {
          const int64_t q = tiles.begin(t), pixel = (row + i) * s.q + q;
          const auto* corner = (const char*)(image + i * s.stride_h * pitch + q * RGB_STEP);
          multiply<STEP>(Tile<E>{{corner, s.r, s.dilation_h * pitch * int64_t(sizeof(Placed)), int(weights.run_units), 0},
                              task.packed + j * NR * weights.rows(),
                              task.y_at((pixel - task.y_row) * s.k + j * NR),
                              s.k,
                              task.shift + j * NR,
                              task.residual ? task.residual + pixel * s.k + j * NR : nullptr,
                              s.relu != 0,
                              int(smaller<int64_t>(NR, s.k - j * NR)),
                              {},
                              nullptr,
                              task.requantise.from(j * NR)},
                             int(tiles.begin(t + 1) - q));
        }
    row += count;
  }
}

template <class E> static void direct_conv(const ConvTask<E>& task, Team team) {
  direct_part(task, share(int64_t(task.shape.n) * task.shape.p, team.thread, team.threads));
}

}  // namespace RF_VARIANT
