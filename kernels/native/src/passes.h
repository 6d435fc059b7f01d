// The passes of training over whole images that are no convolutions: abi.h says what each of them makes.
//
// All are bound by memory, where a vector takes longer to fetch than to compute with: the loops are plain, one pixel after
// the other, and sums live in the first-level cache.
#pragma once

#include "channel_sums.h"

namespace RF_VARIANT {

static inline vec channels_of(const float* vector, int64_t c, int count) {
  return load_some<Float32>(vector + c, count);
}
static inline vec affine(vec v, const float* scale, const float* shift, int64_t c, int count) {
  return multiply_add(channels_of(shift, c, count), v, channels_of(scale, c, count));
}

// Writes a result that nothing was read from. Where it is too large to be found in a cache later, past the caches: a plain
// store would fetch the line first, a third of the traffic of a pass that reads one image.
class Writer {
 public:
  explicit Writer(const rf_pass& s)
      : past(pixels(s) * s.c * 4 >= LARGE && s.c % VL == 0 && uintptr_t(s.result) % sizeof(vec) == 0 &&
             s.result != s.x) {}
  ~Writer() {
#if defined(__x86_64__)
    if (past) _mm_sfence();
#endif
  }
  void operator()(float* p, vec v, int count) const {
    if (past)
      stream(p, v);
    else
      store_some<Float32>(p, v, count);
  }

 private:
  static constexpr int64_t LARGE = 16 << 20;  // bytes: half of a usual third-level cache

  static void stream(float* p, vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
  }

  const bool past;
};

// --- element by element ----------------------------------------------------------------------------------------------

// each(i, c, count) for every vector of a thread's share of the pixels: `count` channels from c on, at offset i.
template <class Each> static inline void each_element(const rf_pass& s, Team team, Each each) {
  const int64_t channels = s.c;
  const Range mine = share(pixels(s), team.thread, team.threads);
  for (int64_t pixel = mine.begin; pixel < mine.end; pixel++)
    each_vector(channels, [&](int64_t c, int count) { each(pixel * channels + c, c, count); });
}

static void tail(const rf_pass s, Team team) {
  const Writer write(s);
  each_element(s, team, [&](int64_t i, int64_t c, int count) {
    vec v = affine(load_some<Float32>(s.x + i, count), s.scale, s.shift, c, count);
    if (s.residual) {
      const vec r = load_some<Float32>(s.residual + i, count);
      v += s.residual_scale ? affine(r, s.residual_scale, s.residual_shift, c, count) : r;
    }
    write(s.result + i, s.relu ? relu(v) : v, count);
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

// The first N of: g, its product with y, its product with the residual's y; added to `values`.
template <int N>
static inline void add_products(const rf_pass& s, vec g, int64_t i, int64_t c, int count, vec (&values)[N ? N : 1]) {
  auto centred = [&](const float* y, const float* mean) {
    return load_some<Float32>(y + i, count) - channels_of(mean, c, count);
  };
  if constexpr (N > 0) values[0] += g;
  if constexpr (N > 1) values[1] = multiply_add(values[1], g, centred(s.y, s.mean));
  if constexpr (N > 2) values[2] = multiply_add(values[2], g, centred(s.residual_y, s.residual_mean));
}

template <int N> static void gate(const rf_pass s, double* partials, Team team) {
  const int64_t channels = s.c;
  const Writer write(s);
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    Sums<N> total(channels, partial);
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
        if (s.result) write(s.result + i, g, count);
        vec values[N ? N : 1] = {};
        add_products<N>(s, g, i, c, count, values);
        total.add(c, values);
      });
      total.end_pixels(1);
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
  const int64_t channels = s.c, width = s.w;
  const int64_t image = row / pooled(s.h), p = row % pooled(s.h);
  const int64_t top = larger<int64_t>(0, 2 * p - 1), bottom = smaller<int64_t>(s.h, 2 * p + 2);
  for (int64_t q = 0; q < pooled(width); q++) {
    const int64_t left = larger<int64_t>(0, 2 * q - 1), right = smaller<int64_t>(width, 2 * q + 2);
    each_vector(channels, [&](int64_t c, int count) {
      const vec scale = channels_of(s.scale, c, count), shift = channels_of(s.shift, c, count);
      vec largest = {}, winner = splat(-1);
      for (int64_t h = top; h < bottom; h++) {
        vec number = splat(float((h - 2 * p + 1) * 3 + left - 2 * q + 1));
        const float* at = x + ((image * s.h + h) * width + left) * channels + c;
        for (int64_t w = left; w < right; w++, at += channels, number += 1) {
          const vec v = multiply_add(shift, load_some<Float32>(at, count), scale);
          const ivec wins = (v > largest) | (v != v);
          largest = wins ? v : largest;
          winner = wins ? number : winner;
        }
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

// A window (p, q) owns the pixels (2p, 2q) to (2p + 1, 2q + 1), which the windows to its right and below see too. Winners
// are found again from y, a row of windows at a time. Beyond the last window they are -1, which no pixel has, and the
// gradient is any that can be read.
template <int N> static void tail_pool_backward(const rf_pass s, double* partials, Team team) {
  const int64_t channels = s.c, padded = round_up(channels, VL), high = pooled(s.h), wide = pooled(s.w);
  const int64_t row_size = (wide + 1) * padded;
  float* winners = scratch(PANELS, 2 * row_size);
  const Writer write(s);
  auto winners_of = [&](int64_t row) { return winners + row % 2 * row_size; };
  auto find_winners = [&](int64_t row, bool inside) {
    float* found = winners_of(row);
    for (int64_t i = inside ? wide * padded : 0; i < row_size; i++) found[i] = -1;
    if (inside)
      each_window(s, s.y, row, [&](int64_t q, int64_t c, int, vec, vec winner) { store(found + q * padded + c, winner); });
  };
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    Sums<N> total(channels, partial);
    for (int64_t row = chunk.begin; row < chunk.end; row++) {
      const int64_t image = row / high, p = row % high;
      const bool last_row = p == high - 1, two_rows = 2 * p + 1 < s.h;
      if (row == chunk.begin || p == 0) find_winners(row, true);
      find_winners(row + 1, !last_row);
      const float *here = winners_of(row), *below = winners_of(row + 1);
      for (int64_t q = 0; q < wide; q++) {
        const bool last_column = q == wide - 1, two_columns = 2 * q + 1 < s.w;
        const int64_t first = ((image * s.h + 2 * p) * s.w + 2 * q) * channels;
        const float* grad = s.x + (row * wide + q) * channels;
        const int64_t right = last_column ? 0 : channels, down = last_row ? 0 : wide * channels;
        each_vector(channels, [&](int64_t c, int count) {
          const vec winner[4] = {load(here + q * padded + c), load(here + (q + 1) * padded + c),
                                 load(below + q * padded + c), load(below + (q + 1) * padded + c)};
          const vec from[4] = {load_some<Float32>(grad + c, count), load_some<Float32>(grad + right + c, count),
                               load_some<Float32>(grad + down + c, count),
                               load_some<Float32>(grad + down + right + c, count)};
          auto won = [&](int window, float number) { return winner[window] == splat(number) ? from[window] : vec{}; };
          vec values[N] = {};
          auto put = [&](int64_t offset, vec g) {
            const int64_t i = first + offset + c;
            write(s.result + i, g, count);
            add_products<N>(s, g, i, c, count, values);
          };
          put(0, won(0, 4));
          if (two_columns) put(channels, won(0, 5) + won(1, 3));
          if (two_rows) put(s.w * channels, won(0, 7) + won(2, 1));
          if (two_rows && two_columns) put((s.w + 1) * channels, won(0, 8) + won(1, 6) + won(2, 2) + won(3, 0));
          total.add(c, values);
        });
        total.end_pixels(4);
      }
    }
    total.end_run();
  });
}

// --- all of them -----------------------------------------------------------------------------------------------------

static void pass(const rf_pass* s, double* partials, int thread, int threads) {
  const Team team = {thread, threads};
  switch (s->kind) {
    case RF_TAIL: return tail(*s, team);
    case RF_TAIL_POOL: return tail_pool(*s, team);
    case RF_STATISTICS: return statistics(*s, partials, team);
    case RF_GATE:
      switch (sums(*s)) {
        case 0: return gate<0>(*s, partials, team);
        case 1: return gate<1>(*s, partials, team);
        case 2: return gate<2>(*s, partials, team);
        default: return gate<3>(*s, partials, team);
      }
    case RF_TAIL_POOL_BACKWARD:
      return sums(*s) == 1 ? tail_pool_backward<1>(*s, partials, team) : tail_pool_backward<2>(*s, partials, team);
    case RF_BN_BACKWARD: return bn_backward(*s, team);
  }
}
static int64_t pass_partials(const rf_pass* s) { return chunks(*s) * sums(*s) * s->c; }
static void finish_pass(const rf_pass* s, const double* partials, int thread, int threads) {
  finish_sums(*s, partials, {thread, threads});
}

}  // namespace RF_VARIANT
