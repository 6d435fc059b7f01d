// Convolution, ReLU and a 3x3/2 max-pool, without the image between. Each thread takes pooled rows, makes the
// convolution's rows for a few of them, and pools these while they lie in its cache.
#pragma once

#include "direct.h"
#include "pool.h"
#include "winograd_stem.h"

namespace RF_VARIANT {

constexpr int STEM_ROWS = 4;  // pooled rows at a time: nine rows of the convolution

// `all`: the convolution, with the pooled image for its y.
template <class E> static void stem(const ConvTask<E>& all, int algorithm, Team team) {
  using Element = typename E::Element;
  const rf_shape& s = all.shape;
  const int height = (s.p - 1) / 2 + 1, width = (s.q - 1) / 2 + 1;
  const int64_t row_elements = int64_t(s.q) * s.k;
  const Range mine = share(int64_t(s.n) * height, team.thread, team.threads);
  if (mine.empty()) return;
  auto* rows = (Element*)scratch(ROWS, (2 * STEM_ROWS + 1) * row_elements);
  rf_shape window{};
  window.w = s.q, window.c = window.k = s.k;
  window.r = window.s = 3, window.stride_h = window.stride_w = 2, window.pad_w = 1;
  int64_t last = -1;  // the convolution's row that lies last in `rows`
  int last_at = 0;    // and where
  for (int64_t at = mine.begin; at < mine.end;) {
    const int64_t image = at / height;
    const int top = int(at % height);
    const int count = int(smaller(smaller<int64_t>(STEM_ROWS, height - top), mine.end - at));
    const int64_t first = image * s.p + larger(0, 2 * top - 1);
    const int64_t end = image * s.p + smaller(s.p, 2 * (top + count));
    const bool kept = last == first;  // the row that this block shares with the one before
    if (kept) memmove(rows, rows + last_at * row_elements, row_elements * sizeof(Element));
    const int64_t from = first + kept;
    const ConvTask<E> task{s, all.x, all.packed, all.shift, nullptr, rows + kept * row_elements, from * s.q};
    if constexpr (sizeof(Element) == sizeof(float)) {
      if (algorithm == RF_DIRECT) direct_part(task, {from, end});
      if (algorithm == RF_WINOGRAD_STEM) WinogradStem::part(task, {from, end});
    }
    if (algorithm == RF_GEMM)
      gemm_part(task, {0, 1}, {from * s.q, end * s.q}, {0, GemmWeights<E>(s).panels()});
    last = end - 1, last_at = int(end - 1 - first);
    window.h = int(end - first);
    window.pad_h = top == 0;  // in every other block, the first row is already the first window's
    for (int i = 0; i < count; i++)
      for (int j = 0; j < width; j++)
        pool_pixel<E>(window, rows, i, j, all.y + ((at + i) * width + j) * s.k, false);
    at += count;
  }
}

}  // namespace RF_VARIANT
