// Sums over pixels, for every channel of an image.
//
// A sum is made in float32 over a run of pixels, in float64 over the runs of a chunk, and then over the chunks, in order.
// Chunks depend on the image alone, so a result is the same bits whatever the number of threads.
#pragma once

#include "abi.h"
#include "pool.h"
#include "work_sharing.h"

namespace RF_VARIANT {

constexpr int64_t LONGEST_RUN = 64;  // pixels
constexpr int64_t MOST_CHUNKS = 60;  // many numbers of threads divide it

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

// N sums for every channel of one chunk, made of vectors that come pixel by pixel.
template <int N> class Sums {
 public:
  Sums(int64_t channels, double* totals)
      : channels(channels), padded(round_up(channels, VL)), run(scratch(ROWS, N * padded)), totals(totals) {
    for (int64_t i = 0; i < N * padded; i++) run[i] = 0;
    for (int64_t i = 0; i < N * channels; i++) totals[i] = 0;
  }
  void add(int64_t c, const vec (&values)[N ? N : 1]) {
    for (int i = 0; i < N; i++) store(run + i * padded + c, load(run + i * padded + c) + values[i]);
  }
  void end_pixels(int64_t number) {
    length += number;
    if (length >= LONGEST_RUN) end_run();
  }
  void end_run() {
    for (int i = 0; i < N; i++) widen(run + i * padded, totals + i * channels);
    length = 0;
  }

 private:
  void widen(float* __restrict sum, double* __restrict total) {
    for (int64_t c = 0; c < channels; c++) total[c] += double(sum[c]), sum[c] = 0;
  }

  int64_t channels, padded, length = 0;
  float* run;
  double* totals;
};

// --- mean and variance -----------------------------------------------------------------------------------------------

// The sum of n values, and the sum of their squared distances from their mean.
struct Moments {
  double sum, squares;
};

// Of n values, maybe none, and m others together (Chan, Golub and LeVeque 1983).
static inline Moments together(Moments a, double n, Moments b, double m) {
  const double apart = b.sum * (1 / m) - a.sum * (1 / larger(n, 1.0));
  return {a.sum + b.sum, a.squares + b.squares + apart * apart * (n * m / (n + m))};
}

// A run of pixels: sums of the values' distances from `shift`, and of their squares.
struct Run {
  float *shift, *first, *second;  // [channels]

  void sum(const rf_pass& s, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < s.c; c++) first[c] = second[c] = 0;
    for (int64_t pixel = begin; pixel < end; pixel++)
      each_vector(s.c, [&](int64_t c, int count) {
        const vec apart = load_some<Float32>(s.x + pixel * s.c + c, count) - load(shift + c);
        store(first + c, load(first + c) + apart);
        store(second + c, multiply_add(load(second + c), apart, apart));
      });
  }
};

// An infinite mean would make later sums NaN.
static inline float finite_or(float value, float other) { return value - value == 0 ? value : other; }

// Adds a run of m pixels to n before it, and moves its shift to the mean of all.
static void add_run(Run run, double m, double n, int64_t channels, double* __restrict sum, double* __restrict squares) {
  float *__restrict shift = run.shift, *__restrict first = run.first, *__restrict second = run.second;
  for (int64_t c = 0; c < channels; c++) {
    const double apart = first[c];
    const Moments added = {shift[c] * m + apart, second[c] - apart * apart * (1 / m)};
    const Moments all = together({sum[c], squares[c]}, n, added, m);
    sum[c] = all.sum, squares[c] = all.squares;
    shift[c] = finite_or(float(all.sum * (1 / (n + m))), shift[c]);
  }
}

// Distances are taken from the mean of the chunk's pixels so far; in the first run from its own mean, for which it is read
// twice. However far that is off, about as far apart are the values themselves: what cancels is small beside what stays.
static void statistics(const rf_pass s, double* partials, Team team) {
  const int64_t channels = s.c, padded = round_up(channels, VL);
  float* memory = scratch(ROWS, 3 * padded);
  Run run = {memory, memory + padded, memory + 2 * padded};
  each_chunk(s, partials, team, [&](Range chunk, double* partial) {
    for (int64_t i = 0; i < 3 * padded; i++) memory[i] = 0;
    for (int64_t i = 0; i < 2 * channels; i++) partial[i] = 0;
    const int64_t first_end = smaller(chunk.end, chunk.begin + LONGEST_RUN);
    run.sum(s, chunk.begin, first_end);
    for (int64_t c = 0; c < channels; c++) run.shift[c] = finite_or(run.first[c] / float(first_end - chunk.begin), 0);
    for (int64_t begin = chunk.begin, end; begin < chunk.end; begin = end) {
      end = smaller(chunk.end, begin + LONGEST_RUN);
      run.sum(s, begin, end);
      add_run(run, double(end - begin), double(begin - chunk.begin), channels, partial, partial + channels);
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
