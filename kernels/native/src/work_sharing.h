// How the work of one operation is shared out, and the memory that a thread works in.
#pragma once

#include "simd.h"
#include "variant.h"

namespace RF_VARIANT {

static inline float* scratch(Slot slot, int64_t floats) { return (float*)rf_scratch(slot, floats * sizeof(float)); }

struct Team {
  int thread, threads;
};

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

static inline Range share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// A thread's part of a range.
static inline Range part(Range all, Team team) {
  const Range mine = share(all.end - all.begin, team.thread, team.threads);
  return {all.begin + mine.begin, all.begin + mine.end};
}

// A grid of threads over `rows` register tiles and `columns` panels of output channels.
struct Grid {
  Range rows, columns;
};

// Every thread makes the panels of its rows itself, and reads the weights of its columns: splitting rows repeats the
// weights' way through the caches, splitting columns repeats the gathering. What counts most is the largest share.
static inline Grid share_grid(int64_t rows, int64_t columns, Team team) {
  constexpr double ONCE = 0.3;  // of making a row's panels or reading a column's weights, in products of one by the other
  int best_tall = 1;
  double best = -1;
  for (int tall = 1; tall <= team.threads; tall++) {
    const int wide = team.threads / tall;
    const double high = double(ceil_div(rows, tall)), broad = double(ceil_div(columns, wide));
    const double cost = high * broad + high * ONCE + broad * ONCE;
    if (best < 0 || cost < best) best = cost, best_tall = tall;
  }
  const int wide = team.threads / best_tall;
  if (team.thread >= best_tall * wide) return {{0, 0}, {0, 0}};
  return {share(rows, team.thread / wide, best_tall), share(columns, team.thread % wide, wide)};
}

// Rows are cut into tiles of at most MR, as equal as can be: 49 rows are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
struct Tiles {
  int64_t rows;
  int64_t count() const { return ceil_div(rows, MR); }
  int64_t begin(int64_t tile) const { return rows * tile / count(); }
  int64_t of(int64_t row) const { return ((row + 1) * count() - 1) / rows; }
};

}  // namespace RF_VARIANT
