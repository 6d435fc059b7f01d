// Convolution, ReLU and a 3x3/2 max-pool, without the image between. Each thread takes pooled rows, makes the
// convolution's rows for a few of them, and pools these while they lie in its cache.
#pragma once

#include "direct.h"
#include "pool.h"
#include "winograd_stem.h"

namespace RF_VARIANT {

// Some of the convolution's rows, counted over all images.
template <class E> static void convolve_rows(const ConvTask<E>& task, int algorithm, Range rows) {
  const rf_shape& s = task.shape;
  if constexpr (E::DIRECT)
    if (algorithm == RF_DIRECT) return direct_part(task, rows);
  if constexpr (E::WINOGRAD) {
    if (algorithm == RF_WINOGRAD_STEM) return WinogradStem::part(task, rows);
  }
  gemm_part(task, {0, 1}, {rows.begin * s.q, rows.end * s.q}, {0, GemmWeights<E>(s).panels()});
}

constexpr int STEM_ROWS = 4;  // pooled rows at a time: nine rows of the convolution
// Threads get whole rows of Winograd's tiles: whatever their number, the tiles are the same, and so are the last bits.
constexpr int STEM_SHARE = FourTaps::OUT / 2;

// `all`: the convolution, with the pooled image for its y.
template <class E> static void stem(const ConvTask<E>& all, int algorithm, Team team) {
  using Element = typename E::Element;
  const rf_shape& s = all.shape;
  const int height = (s.p - 1) / 2 + 1, width = (s.q - 1) / 2 + 1;
  const int64_t row_elements = int64_t(s.q) * s.k, shares = ceil_div(height, STEM_SHARE);
  const Range mine = share(s.n * shares, team.thread, team.threads);
  if (mine.empty()) return;
  auto* rows = (Element*)scratch(ROWS, (FourTaps::OUT + 2 * STEM_ROWS) * row_elements);
  rf_shape window{};
  window.w = s.q, window.c = window.k = s.k;
  window.r = window.s = 3, window.stride_h = window.stride_w = 2, window.pad_w = 1;
  int64_t last = -1;                 // the convolution's row that was made last
  const Element* last_at = nullptr;  // and where it lies
  for (int64_t at = mine.begin; at < mine.end;) {
    const int64_t image = at / shares;
    const int top = int(at % shares) * STEM_SHARE;
    const int count = int(smaller(smaller<int64_t>(STEM_ROWS, height - top), (mine.end - at) * STEM_SHARE));
    const int64_t first = image * s.p + larger(0, 2 * top - 1);
    const int64_t end = image * s.p + smaller(s.p, 2 * (top + count));
    const bool kept = last == first;  // the row that this block shares with the one before
    if (kept) memmove(rows, last_at, row_elements * sizeof(Element));
    // Else it is the last one of its tiles, and the others come with it.
    const int64_t before = algorithm == RF_WINOGRAD_STEM && !kept && top ? FourTaps::OUT - 1 : 0;
    const int64_t from = first - before;
    const ConvTask<E> task{s, all.x, all.packed, all.shift, nullptr, rows, from * s.q, {}, {}, all.requantise};
    convolve_rows(task, algorithm, {from + kept, end});
    const Element* first_at = rows + before * row_elements;
    last = end - 1, last_at = first_at + (last - first) * row_elements;
    window.h = int(end - first);
    window.pad_h = top == 0;  // in every other block, the first row is already the first window's
    Element* y = all.y + (image * height + top) * width * s.k;
    for (int i = 0; i < count; i++)
      for (int j = 0; j < width; j++) pool_pixel<E>(window, first_at, i, j, y + (int64_t(i) * width + j) * s.k, false);
    at += ceil_div(count, STEM_SHARE);
  }
}

}  // namespace RF_VARIANT
