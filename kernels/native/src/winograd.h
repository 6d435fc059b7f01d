// Winograd's minimal filtering for 3x3 (Lavin and Gray 2015, arXiv:1509.09308): y = A' [U * (B' d B)] A.
//
// A thread takes a block of tiles that fits its cache: transforms their input into panels, one set per point of the
// transformed domain; then, for 2 vectors of output channels at a time, multiplies at every point and transforms back,
// with shift, residual and ReLU in the last step. Neither transformed image ever exists as a whole.
#pragma once

#include "conv.h"
#include "register_tile.h"
#include "weights.h"
#include "winograd_filters.h"
#include "work_sharing.h"

namespace RF_VARIANT {

// The way back through stride 2 and padding 1.
static bool upsampling_supports(const rf_shape& s) {
  return s.stride_h == -2 && s.pad_h == 0 && s.pad_w == 0 && (s.p + 1) / 2 == s.h && (s.q + 1) / 2 == s.w;
}

static inline bool winograd_supports(const rf_shape& s) {
  return s.r == 3 && s.s == 3 && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1 &&
         !s.pool && (s.stride_h == 1 || s.stride_h == 2 || upsampling_supports(s));
}

// Transformed weights: panels of NR output channels, each [WEIGHTS][WEIGHTS][C][NR], the last one [..][VL] if that is
// enough.
template <class F> struct WinogradWeights {
  static constexpr int TAPS = F::TAPS, WEIGHTS = F::WEIGHTS;

  static int64_t floats(const rf_shape& s) { return int64_t(WEIGHTS) * WEIGHTS * s.c * round_up(s.k, VL); }

  // Points lie a power of two apart, mostly, so that the lines of a channel would fight for one set of the cache: the
  // points of a few channels are made side by side, and copied out a run at a time.
  static void pack(const WeightSource& from, float* packed, Team team) {
    const rf_shape& s = from.shape;
    constexpr int POINTS = WEIGHTS * WEIGHTS;
    const Range mine = share(ceil_div(s.k, NR), team.thread, team.threads);
    auto* block = (double*)rf_scratch(PANELS, from.block_doubles() * sizeof(double));
    constexpr int PITCH = WeightSource::CHUNK * NR + VL;  // an odd number of lines
    float* points = scratch(ROWS, POINTS * PITCH);
    for (int64_t k = mine.begin * NR; k < mine.end * NR && k < s.k; k += NR) {
      const int width = s.k - k > VL ? NR : VL;
      float* to = packed + POINTS * s.c * k;
      for (int c = 0; c < s.c; c += from.CHUNK) {
        const int count = smaller(from.CHUNK, s.c - c);
        for (int part = 0; part < width; part += VL) {
          from.block(int(k) + part, smaller(VL, int(s.k - k) - part), c, count, block);
          for (int i = 0; i < 2 * count; i++) {
            const int at = i * HALF;
            dvec u[WEIGHTS][WEIGHTS];
            transform(block + at, count * VL, u);
#pragma GCC unroll 49
            for (int j = 0; j < POINTS; j++)
              store_rounded(points + j * PITCH + at / VL * width + part + at % VL, u[j / WEIGHTS][j % WEIGHTS]);
          }
        }
        for (int j = 0; j < POINTS; j++)
          memcpy(to + (int64_t(j) * s.c + c) * width, points + j * PITCH, int64_t(count) * width * sizeof(float));
      }
    }
  }

  // Of the taps of HALF channels, `step` doubles from one tap to the next.
  static void transform(const double* g, int64_t step, dvec (&u)[WEIGHTS][WEIGHTS]) {
    dvec half[TAPS][WEIGHTS], taps[TAPS];
#pragma GCC unroll 4
    for (int j = 0; j < TAPS; j++) {
#pragma GCC unroll 4
      for (int i = 0; i < TAPS; i++) taps[i] = *(const dvec_u*)(g + (i * TAPS + j) * step);
      F::weight(taps, half[j]);
    }
#pragma GCC unroll 9
    for (int i = 0; i < WEIGHTS; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < TAPS; j++) taps[j] = half[j][i];
      F::weight(taps, u[i]);
    }
  }
};

// A convolution whose input pixels may lie further apart than their channels are many.
struct WinogradTask : ConvTask<Float32> {
  int64_t pixel;  // floats that an input pixel takes up, at least its channels

  explicit WinogradTask(const ConvTask<Float32>& conv) : ConvTask<Float32>(conv), pixel(shape.c) {}
};

// Outputs side by side, cut into whole tiles and, if the filter has edges, a smaller one for what is left.
template <class F> struct Cut {
  int whole, left;  // tiles; outputs

  explicit Cut(int length)
      : whole(F::EDGES ? length / F::OUT : int(ceil_div(length, F::OUT))), left(F::EDGES ? length % F::OUT : 0) {}
  int64_t tiles(bool edge) const { return edge ? left > 0 : whole; }
  // Calls use(filter) with the filter of a tile.
  template <class Use> auto with_filter(bool edge, Use use) const {
    if constexpr (F::EDGES) {
      if (edge && left == F::OUT - 1) return use(Edge<F::OUT - 1, F::STRIDE>());
      if (edge) return use(Edge<F::OUT - 2, F::STRIDE>());
    }
    return use(F());
  }
  // Of all tiles.
  int64_t points() const {
    return whole * F::POINTS + tiles(true) * with_filter(true, [](auto filter) { return int64_t(filter.POINTS); });
  }
  // Whether the smaller tile has that point of a whole one.
  bool edge_has(int point) const {
    return with_filter(true, [&](auto filter) {
      for (int i = 0; i < filter.POINTS; i++)
        if (filter.point_of(i) == point) return true;
      return false;
    });
  }
};

// A tile has the same points, and so the same last bits, whatever other tiles there are. Smaller tiles have some of the
// points of whole ones, and are rows of the same products: the weights are read once.
template <class F> struct Winograd {
  static constexpr int POINTS = F::POINTS * F::POINTS, WEIGHTS = F::WEIGHTS;

  // Which of the transformed weights a point is multiplied by.
  static int64_t weights_of(int point) {
    return F::weight_of(point / F::POINTS) * WEIGHTS + F::weight_of(point % F::POINTS);
  }

  struct Place {  // of a tile
    int64_t image;
    int p, q;
    bool edge_p, edge_q;
  };

  // The tiles of all images lie in an order in which those that have a point are side by side.
  struct Task : WinogradTask {
    static constexpr bool KINDS[4][2] = {{false, true}, {false, false}, {true, false}, {true, true}};  // edge_p, edge_q
    Cut<F> high, wide;
    int64_t lines;       // of VL input channels
    int64_t starts[5];   // of each kind of tiles; the end
    Range with[POINTS];  // the tiles that have a point

    explicit Task(const WinogradTask& task)
        : WinogradTask(task), high(shape.p), wide(shape.q), lines(ceil_div(shape.c, VL)), starts{} {
      for (int i = 0; i < 4; i++)
        starts[i + 1] = starts[i] + shape.n * high.tiles(KINDS[i][0]) * wide.tiles(KINDS[i][1]);
      for (int point = 0; point < POINTS; point++) {
        const bool p = high.edge_has(point / F::POINTS), q = wide.edge_has(point % F::POINTS);
        with[point] = {starts[q ? 0 : 1], starts[!p ? 2 : q ? 4 : 3]};
      }
    }
    int64_t tiles() const { return starts[4]; }
    Place place(int64_t tile) const {
      int kind = 0;
      while (tile >= starts[kind + 1]) kind++;
      const auto [edge_p, edge_q] = KINDS[kind];
      const int64_t across = wide.tiles(edge_q), per_image = high.tiles(edge_p) * across, number = tile - starts[kind];
      const int64_t p = edge_p ? high.whole : number % per_image / across, q = edge_q ? wide.whole : number % across;
      return {number / per_image, int(p) * F::OUT, int(q) * F::OUT, edge_p, edge_q};
    }
    // Calls use(filter_p, filter_q).
    template <class Use> void with_filters(const Place& at, Use use) const {
      high.with_filter(at.edge_p, [&](auto p) { wide.with_filter(at.edge_q, [&](auto q) { use(p, q); }); });
    }
  };

  // The number of a tile's point, among those of a whole tile.
  template <class FP, class FQ> static constexpr int point_of(int i, int j) {
    return FP::point_of(i) * F::POINTS + FQ::point_of(j);
  }

  // Input transform of one tile into its row of the panels; `v` at that row, `line_step` floats from a line of channels
  // to the next, `point_step` from point to point. A function for each pair of filters: with all of them in one, GCC
  // would no longer inline the filters.
  template <class FP, class FQ>
  static __attribute__((noinline)) void transform_input(const Task& task, const Place& at, float* v, int64_t line_step,
                                                        int64_t point_step) {
    const rf_shape& s = task.shape;
    const float* image = task.x + at.image * s.h * s.w * task.pixel;
    const int y0 = FP::first_input(at.p) - s.pad_h, x0 = FQ::first_input(at.q) - s.pad_w;
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + FP::IN <= s.h && x0 + FQ::IN <= s.w;
    for (int64_t line = 0; line < task.lines; line++, v += line_step) {
      const int channels = int(smaller<int64_t>(VL, task.pixel - line * VL));
      const float* corner = image + (int64_t(y0) * s.w + x0) * task.pixel + line * VL;
      const Prologue prologue = task.prologue.from(line * VL);
      const vec scale = prologue ? load_some<Float32>(prologue.scale, channels) : vec{};
      const vec shift = prologue ? load_some<Float32>(prologue.shift, channels) : vec{};
      vec half[FP::POINTS][FQ::IN];
      auto transform_columns = [&](auto pixel, bool activate) __attribute__((always_inline)) {
#pragma GCC unroll 9
        for (int j = 0; j < FQ::IN; j++) {
          vec d[FP::IN], column[FP::POINTS];
#pragma GCC unroll 9
          for (int i = 0; i < FP::IN; i++) d[i] = pixel(i, j, corner + (int64_t(i) * s.w + j) * task.pixel);
          if (activate)
#pragma GCC unroll 9
            for (int i = 0; i < FP::IN; i++) d[i] = activated(d[i], scale, shift);
          FP::input(d, column);
#pragma GCC unroll 9
          for (int i = 0; i < FP::POINTS; i++) half[i][j] = column[i];
        }
      };
      if (inside && channels == VL)
        transform_columns([](int, int, const float* at) { return load(at); }, bool(prologue));
      else
        transform_columns([&](int i, int j, const float* at) {
          const bool there = y0 + i >= 0 && y0 + i < s.h && x0 + j >= 0 && x0 + j < s.w;
          return there ? prologue(at, 0, channels) : vec{};
        }, false);
#pragma GCC unroll 9
      for (int i = 0; i < FP::POINTS; i++) {
        vec row[FQ::POINTS];
        FQ::input(half[i], row);
#pragma GCC unroll 9
        for (int j = 0; j < FQ::POINTS; j++) store(v + point_of<FP, FQ>(i, j) * point_step, row[j]);
      }
    }
  }

  // Output transform of one tile for one vector of channels, from `m`, `point_step` floats from point to point.
  template <class FP, class FQ>
  static __attribute__((noinline)) void transform_output(const Task& task, const Place& at, const float* m,
                                                         int64_t point_step, int channel) {
    const rf_shape& s = task.shape;
    const int channels = smaller(VL, s.k - channel);
    vec half[FP::OUT][FQ::POINTS];
#pragma GCC unroll 9
    for (int j = 0; j < FQ::POINTS; j++) {
      vec column[FP::POINTS], out[FP::OUT];
#pragma GCC unroll 9
      for (int i = 0; i < FP::POINTS; i++) column[i] = load(m + point_of<FP, FQ>(i, j) * point_step);
      FP::output(column, out);
#pragma GCC unroll 8
      for (int i = 0; i < FP::OUT; i++) half[i][j] = out[i];
    }
    const int high = smaller(FP::OUT, s.p - at.p), wide = smaller(FQ::OUT, s.q - at.q);
    const int64_t corner = ((at.image * s.p + at.p) * s.q + at.q) * s.k + channel;
    const vec shift = load_some<Float32>(task.shift + channel, channels);
    const bool whole = high == FP::OUT && wide == FQ::OUT && channels == VL;
#pragma GCC unroll 8
    for (int i = 0; i < FP::OUT; i++) {
      vec out[FQ::OUT];
      FQ::output(half[i], out);
#pragma GCC unroll 8
      for (int j = 0; j < FQ::OUT; j++) {
        if (!whole && (i >= high || j >= wide)) continue;
        const int64_t pixel = corner + (int64_t(i) * s.q + j) * s.k;
        vec v = out[j] + shift;
        if (task.residual) v += load_some<Float32>(task.residual + pixel, channels);
        store_some<Float32>(task.y + pixel, s.relu ? relu(v) : v, channels);
      }
    }
  }

  // The block's tiles are cut into panels of at most MR. Transformed inputs lie as [point][panel][line][tile][VL].
  static void block(const Task& task, Range range, Range columns, float* v, int64_t v_point, float* m) {
    const rf_shape& s = task.shape;
    const Tiles panels{range.end - range.begin};
    const int64_t panel_count = panels.count(), m_point = panels.rows * NR + VL;
    for (int64_t panel = 0; panel < panel_count; panel++) {
      const int64_t first = panels.begin(panel), rows = panels.begin(panel + 1) - first;
      for (int64_t i = 0; i < rows; i++) {
        const Place at = task.place(range.begin + first + i);
        task.with_filters(at, [&](auto p, auto q) {
          float* row = v + first * task.lines * VL + i * VL;
          transform_input<decltype(p), decltype(q)>(task, at, row, rows * VL, v_point);
        });
      }
    }
    for (int64_t j = columns.begin; j < columns.end; j++) {
      const int channel = int(j * NR), channels = smaller(NR, s.k - channel), width = channels > VL ? NR : VL;
      const float* u = task.packed + int64_t(WEIGHTS) * WEIGHTS * s.c * channel;
      auto weights = [&](int point) { return u + weights_of(point) * s.c * width; };
      for (int point = 0, after; point < POINTS; point = after) {
        const Range with = rows(task, range, point);
        for (after = point + 1; after < POINTS && rows(task, range, after).empty();) after++;
        if (with.empty()) continue;
        const bool more = width == NR && after < POINTS && weights_of(after) != weights_of(point);
        const float* next = more ? weights(after) : nullptr;
        const int64_t first_panel = panels.of(with.begin), end_panel = panels.of(with.end - 1) + 1;
        for (int64_t i = first_panel; i < end_panel; i++) {
          const int64_t first = panels.begin(i), end = panels.begin(i + 1);
          const int64_t from = larger(first, with.begin), height = smaller(end, with.end) - from;
          const float* left = v + point * v_point + first * task.lines * VL + (from - first) * VL;
          const Ahead ahead = Ahead::share(next, i - first_panel, end_panel - first_panel);
          multiply(Tile<Float32>{panel(left, int(end - first), s.c), weights(point), m + point * m_point + from * width,
                                 width, nullptr, nullptr, false, width, ahead, nullptr},
                   int(height));
        }
      }
      for (int64_t i = 0; i < panels.rows; i++) {
        const Place at = task.place(range.begin + i);
        task.with_filters(at, [&](auto p, auto q) {
          for (int part = 0; part < channels; part += VL)
            transform_output<decltype(p), decltype(q)>(task, at, m + i * width + part, m_point, channel + part);
        });
      }
    }
  }

  // Those of a block's tiles that have a point.
  static Range rows(const Task& task, Range block, int point) {
    const Range& all = task.with[point];
    return {larger(all.begin, block.begin) - block.begin, smaller(all.end, block.end) - block.begin};
  }

  static void conv(const WinogradTask& winograd_task, Team team) {
    const Task task(winograd_task);
    if (!task.tiles()) return;
    const Tiles panels{task.tiles()};
    const Grid grid = share_grid(panels.count(), ceil_div(task.shape.k, NR), team);
    if (grid.rows.empty() || grid.columns.empty()) return;
    const Range mine{panels.begin(grid.rows.begin), panels.begin(grid.rows.end)};
    // A block's transformed input takes a quarter of the cache: its products, the weights and the image need the rest.
    const int64_t tile_floats = POINTS * task.lines * VL;
    const int64_t fitting = rf_cache_bytes() / 4 / int64_t(sizeof(float)) / tile_floats / MR * MR;
    const int64_t size = smaller(mine.end - mine.begin, larger<int64_t>(fitting, MR));
    const int64_t blocks = ceil_div(mine.end - mine.begin, size);
    // An odd number of lines from point to point spreads a tile's 36 stores over the sets of the first-level cache.
    const int64_t longest = ceil_div(mine.end - mine.begin, blocks);
    const int64_t v_point = (longest * task.lines | 1) * VL, m_point = longest * NR + VL;
    float* v = scratch(PANELS, POINTS * (v_point + m_point));
    for (int64_t i = 0; i < blocks; i++) {
      const Range part = share(mine.end - mine.begin, i, blocks);
      block(task, {mine.begin + part.begin, mine.begin + part.end}, grid.columns, v, v_point, v + POINTS * v_point);
    }
  }
};

// A convolution by Filter<OUT, STRIDE>.
template <int OUT, int STRIDE> struct WinogradConv : WinogradWeights<Filter<OUT, STRIDE>> {
  using F = Filter<OUT, STRIDE>;

  static int64_t products(const rf_shape& s) { return s.n * Cut<F>(s.p).points() * Cut<F>(s.q).points(); }

  static void conv(const ConvTask<Float32>& task, Team team) { Winograd<F>::conv(WinogradTask(task), team); }
};

}  // namespace RF_VARIANT
