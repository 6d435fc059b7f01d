// Sums over pixels, for every channel of an image.
//
// A sum is made in float32 over a run of pixels, in float64 over the runs of a chunk, and then over the chunks, in order.
// Chunks depend on the image alone, so a result is the same bits whatever the number of threads.
#pragma once

#include "abi.h"
#include "pool.h"
#include "work.h"

namespace RF_VARIANT {

constexpr int64_t LONGEST_RUN = 32;   // pixels
constexpr int64_t MOST_CHUNKS = 240;  // many numbers of threads divide it

static inline int64_t pooled(int64_t size) { return (size - 1) / 2 + 1; }  // by a 3x3/2 pool with padding 1
static inline int64_t pixels(const rf_pass& s) { return int64_t(s.n) * s.h * s.w; }

// What is cut into chunks: rows of windows where there is a pool, else pixels.
static inline int64_t units(const rf_pass& s) {
  return s.kind == RF_TAIL_POOL_BACKWARD ? s.n * pooled(s.h) : pixels(s);
}
static inline int64_t chunks(const rf_pass& s) {
  return larger<int64_t>(1, smaller(units(s), smaller(pixels(s) / LONGEST_RUN, MOST_CHUNKS)));
}
static inline int64_t sums(const rf_pass& s) {
  int64_t number = 0;
  while (number < RF_MOST_SUMS && s.sums[number]) number++;
  return number;
}

// use(units, partials) for each of a thread's chunks. partials: [sums][c], the chunk's own.
template <class Use> static inline void each_chunk(const rf_pass& s, double* partials, Team team, Use use) {
  const int64_t count = chunks(s), size = sums(s) * s.c;
  const Range mine = share(count, team.thread, team.threads);
  for (int64_t i = mine.begin; i < mine.end; i++) use(share(units(s), i, count), partials + i * size);
}

// The sums of one chunk, of vectors that come pixel by pixel.
class Sums {
 public:
  Sums(int64_t number, int64_t channels, double* totals)
      : number(number), channels(channels), padded(round_up(channels, VL)), totals(totals) {
    run = scratch(ROWS, number * padded);
    for (int64_t i = 0; i < number * padded; i++) run[i] = 0;
    for (int64_t i = 0; i < number * channels; i++) totals[i] = 0;
  }
  void add(int64_t which, int64_t c, vec v) {
    float* sum = run + which * padded + c;
    store(sum, load(sum) + v);
  }
  void end_pixel() {
    if (++length == LONGEST_RUN) end_run();
  }
  void end_run() {
    for (int64_t which = 0; which < number; which++) {
      float* sum = run + which * padded;
      double* total = totals + which * channels;
      for (int64_t c = 0; c < channels; c++) total[c] += double(sum[c]), sum[c] = 0;
    }
    length = 0;
  }

 private:
  int64_t number, channels, padded, length = 0;
  float* run;
  double* totals;
};

// --- mean and variance -----------------------------------------------------------------------------------------------

// The sum of some values, and the sum of their squared distances from their mean.
struct Moments {
  double sum, squares;
};

// Of `n` values and `m` others together (Chan, Golub and LeVeque 1983).
static inline Moments together(Moments a, double n, Moments b, double m) {
  const double apart = b.sum / m - a.sum / n;
  return {a.sum + b.sum, a.squares + b.squares + apart * apart * (n * m / (n + m))};
}

// Distances are taken from the run's own mean, so nothing cancels where a mean is far larger than the deviation. A run
// stays in the cache for that second look at it.
static void statistics(const rf_pass s, double* partials, Team team) {
  constexpr int64_t CACHED = 64 << 10;  // bytes
  const int64_t channels = s.c, padded = round_up(channels, VL);
  const int64_t longest = larger<int64_t>(4, smaller<int64_t>(LONGEST_RUN, CACHED / 4 / channels));
  float *mean = scratch(ROWS, 3 * padded), *first = mean + padded, *second = first + padded;
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    for (int64_t begin = chunk.begin, end; begin < chunk.end; begin = end) {
      end = smaller(chunk.end, begin + longest);
      for (int64_t i = 0; i < 3 * padded; i++) mean[i] = 0;
      for (int64_t pixel = begin; pixel < end; pixel++)
        each_vector(channels, [&](int64_t c, int count) {
          store(mean + c, load(mean + c) + load_some<Float32>(s.x + pixel * channels + c, count));
        });
      for (int64_t c = 0; c < channels; c++) mean[c] /= float(end - begin);
      for (int64_t pixel = begin; pixel < end; pixel++)
        each_vector(channels, [&](int64_t c, int count) {
          const vec apart = load_some<Float32>(s.x + pixel * channels + c, count) - load(mean + c);
          store(first + c, load(first + c) + apart);
          store(second + c, load(second + c) + apart * apart);
        });
      const double n = double(begin - chunk.begin), m = double(end - begin);
      for (int64_t c = 0; c < channels; c++) {
        // What rounding the mean left over. It is NaN, and the mean right, where the mean is infinite.
        const double left = first[c] == first[c] ? double(first[c]) : 0;
        const Moments run = {mean[c] * m + left, second[c] - left * left / m};
        const Moments all = n ? together({partial[c], partial[channels + c]}, n, run, m) : run;
        partial[c] = all.sum, partial[channels + c] = all.squares;
      }
    }
  });
}

// --- chunks together -------------------------------------------------------------------------------------------------

static void finish_statistics(const rf_pass& s, const double* partials, Range channels) {
  const int64_t count = chunks(s);
  for (int64_t c = channels.begin; c < channels.end; c++) {
    auto of_chunk = [&](int64_t i) { return Moments{partials[2 * i * s.c + c], partials[(2 * i + 1) * s.c + c]}; };
    Moments all = of_chunk(0);
    for (int64_t i = 1; i < count; i++) {
      const Range chunk = share(units(s), i, count);
      all = together(all, double(chunk.begin), of_chunk(i), double(chunk.end - chunk.begin));
    }
    s.sums[0][c] = float(all.sum / double(pixels(s)));
    s.sums[1][c] = float(all.squares / double(pixels(s)));
  }
}

// A thread's share of the channels, once every chunk is done.
static void finish_sums(const rf_pass& s, const double* partials, Team team) {
  const int64_t count = chunks(s), number = sums(s);
  const Range mine = share(s.c, team.thread, team.threads);
  if (s.kind == RF_STATISTICS) return finish_statistics(s, partials, mine);
  for (int64_t which = 0; which < number; which++)
    for (int64_t c = mine.begin; c < mine.end; c++) {
      double total = 0;
      for (int64_t i = 0; i < count; i++) total += partials[(i * number + which) * s.c + c];
      s.sums[which][c] = float(total);
    }
}

}  // namespace RF_VARIANT
