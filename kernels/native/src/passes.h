// The passes of training over whole images that are no convolutions: abi.h says what each of them makes.
//
// All are bound by memory, where a vector takes longer to fetch than to compute with: the loops are plain, one pixel after
// the other, and sums live in the first-level cache.
#pragma once

#include "sums.h"

namespace RF_VARIANT {

static inline vec channels_of(const float* vector, int64_t c, int count) {
  return load_some<Float32>(vector + c, count);
}
static inline vec affine(vec v, const float* scale, const float* shift, int64_t c, int count) {
  return v * channels_of(scale, c, count) + channels_of(shift, c, count);
}

// --- element by element ----------------------------------------------------------------------------------------------

// each(i, c, count) for every vector of a thread's share of the pixels: `count` channels from c on, at offset i.
template <class Each> static inline void each_element(const rf_pass& s, Team team, Each each) {
  const int64_t channels = s.c;
  const Range mine = share(pixels(s), team.thread, team.threads);
  for (int64_t pixel = mine.begin; pixel < mine.end; pixel++)
    each_vector(channels, [&](int64_t c, int count) { each(pixel * channels + c, c, count); });
}

static void tail(const rf_pass s, Team team) {
  each_element(s, team, [&](int64_t i, int64_t c, int count) {
    vec v = affine(load_some<Float32>(s.x + i, count), s.scale, s.shift, c, count);
    if (s.residual) {
      const vec r = load_some<Float32>(s.residual + i, count);
      v += s.residual_scale ? affine(r, s.residual_scale, s.residual_shift, c, count) : r;
    }
    store_some<Float32>(s.result + i, s.relu ? relu(v) : v, count);
  });
}

static void bn_backward(const rf_pass s, Team team) {
  each_element(s, team, [&](int64_t i, int64_t c, int count) {
    const vec g = load_some<Float32>(s.x + i, count);
    const vec centred = load_some<Float32>(s.y + i, count) - channels_of(s.mean, c, count);
    const vec v = channels_of(s.scale, c, count) * g - channels_of(s.slope, c, count) * centred;
    store_some<Float32>(s.result + i, v - channels_of(s.shift, c, count), count);
  });
}

// --- gradients, with the sums that batch norm's backward pass needs of them --------------------------------------------

// sums[0] of g, sums[1] of its product with y, sums[2] with the residual's y; those that are asked for.
static inline void add_products(const rf_pass& s, Sums& total, vec g, int64_t i, int64_t c, int count) {
  auto centred = [&](const float* y, const float* mean) {
    return load_some<Float32>(y + i, count) - channels_of(mean, c, count);
  };
  if (s.sums[0]) total.add(0, c, g);
  if (s.sums[1]) total.add(1, c, g * centred(s.y, s.mean));
  if (s.sums[2]) total.add(2, c, g * centred(s.residual_y, s.residual_mean));
}

static void gate(const rf_pass s, double* partials, Team team) {
  const int64_t channels = s.c;
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    Sums total(sums(s), channels, partial);
    for (int64_t pixel = chunk.begin; pixel < chunk.end; pixel++) {
      each_vector(channels, [&](int64_t c, int count) {
        const int64_t i = pixel * channels + c;
        vec g = load_some<Float32>(s.x + i, count);
        if (s.residual) g += load_some<Float32>(s.residual + i, count);
        if (s.gate) {
          vec a = load_some<Float32>(s.gate + i, count);
          if (s.scale) a = affine(a, s.scale, s.shift, c, count);
          g = a <= vec{} ? vec{} : g;  // NaN lets through
        }
        if (s.result) store_some<Float32>(s.result + i, g, count);
        add_products(s, total, g, i, c, count);
      });
      total.end_pixel();
    }
    total.end_run();
  });
}

// --- the stem's pool -------------------------------------------------------------------------------------------------

// A row of windows of max_pool2d(relu(x * scale + shift), 3, 2, 1): each(q, c, count, largest, winner) for every vector.
// The winner is the number, from 0 to 8 in reading order, of the pixel that the gradient goes to: the last NaN if there
// is one, the first of equals else; -1 where the ReLU leaves nothing. As a float, to be compared as quickly.
template <class Each>
static inline void each_window(const rf_pass& s, const float* x, int64_t row, Each each) {
  const int64_t channels = s.c, width = s.w, wide = pooled(s.w);
  const int64_t image = row / pooled(s.h), p = row % pooled(s.h);
  const int64_t top = larger<int64_t>(0, 2 * p - 1), bottom = smaller<int64_t>(s.h, 2 * p + 2);
  for (int64_t q = 0; q < wide; q++) {
    const int64_t left = larger<int64_t>(0, 2 * q - 1), right = smaller<int64_t>(width, 2 * q + 2);
    each_vector(channels, [&](int64_t c, int count) {
      const vec scale = channels_of(s.scale, c, count), shift = channels_of(s.shift, c, count);
      vec largest = {}, winner = splat(-1);
      for (int64_t h = top; h < bottom; h++)
        for (int64_t w = left; w < right; w++) {
          const vec v = load_some<Float32>(x + ((image * s.h + h) * width + w) * channels + c, count) * scale + shift;
          const ivec wins = (v > largest) | (v != v);
          largest = wins ? v : largest;
          winner = wins ? splat(float((h - 2 * p + 1) * 3 + w - 2 * q + 1)) : winner;
        }
      each(q, c, count, largest, winner);
    });
  }
}

static void tail_pool(const rf_pass s, Team team) {
  const int64_t channels = s.c, wide = pooled(s.w);
  const Range mine = share(s.n * pooled(s.h), team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++)
    each_window(s, s.x, row, [&](int64_t q, int64_t c, int count, vec largest, vec) {
      store_some<Float32>(s.result + (row * wide + q) * channels + c, largest, count);
    });
}

// A chunk's rows of windows own the image's rows 2p - 1 and 2p, and the last also the one below it. Winners are found
// again from y, a row of windows at a time; those of the row above are kept for the image's odd rows, which both see.
static void tail_pool_backward(const rf_pass s, double* partials, Team team) {
  const int64_t channels = s.c, padded = round_up(channels, VL), width = s.w, high = pooled(s.h), wide = pooled(s.w);
  float* winners = scratch(PANELS, 2 * wide * padded);  // of even and of odd rows of windows
  auto winner_at = [&](int64_t row, int64_t q, int64_t c) { return winners + (row % 2 * wide + q) * padded + c; };
  auto find_winners = [&](int64_t row) {
    each_window(s, s.y, row, [&](int64_t q, int64_t c, int, vec, vec winner) { store(winner_at(row, q, c), winner); });
  };
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    Sums total(sums(s), channels, partial);
    // The row h of an image, which the windows from row `first` to `last` see.
    auto spread = [&](int64_t image, int64_t h, int64_t first, int64_t last) {
      for (int64_t w = 0; w < width; w++) {
        const int64_t left = w / 2, right = smaller(wide - 1, (w + 1) / 2);
        each_vector(channels, [&](int64_t c, int count) {
          vec g = {};
          for (int64_t row = first; row <= last; row++)
            for (int64_t q = left; q <= right; q++) {
              const int64_t number = (h - 2 * (row - image * high) + 1) * 3 + w - 2 * q + 1;
              const vec from = load_some<Float32>(s.x + (row * wide + q) * channels + c, count);
              g += load(winner_at(row, q, c)) == splat(float(number)) ? from : vec{};
            }
          const int64_t i = ((image * s.h + h) * width + w) * channels + c;
          store_some<Float32>(s.result + i, g, count);
          add_products(s, total, g, i, c, count);
        });
        total.end_pixel();
      }
    };
    for (int64_t row = chunk.begin; row < chunk.end; row++) {
      const int64_t image = row / high, p = row % high;
      if (p && row == chunk.begin) find_winners(row - 1);
      find_winners(row);
      if (p) spread(image, 2 * p - 1, row - 1, row);
      spread(image, 2 * p, row, row);
      if (2 * p + 1 == s.h - 1) spread(image, 2 * p + 1, row, row);
    }
    total.end_run();
  });
}

static void pass(const rf_pass* s, double* partials, int thread, int threads) {
  const Team team = {thread, threads};
  switch (s->kind) {
    case RF_TAIL: return tail(*s, team);
    case RF_TAIL_POOL: return tail_pool(*s, team);
    case RF_STATISTICS: return statistics(*s, partials, team);
    case RF_GATE: return gate(*s, partials, team);
    case RF_TAIL_POOL_BACKWARD: return tail_pool_backward(*s, partials, team);
    case RF_BN_BACKWARD: return bn_backward(*s, team);
  }
}
static int64_t pass_partials(const rf_pass* s) { return chunks(*s) * sums(*s) * s->c; }
static void finish_pass(const rf_pass* s, const double* partials, int thread, int threads) {
  finish_sums(*s, partials, {thread, threads});
}

}  // namespace RF_VARIANT
