// Winograd's minimal filtering for 3x3 (Lavin and Gray 2015, arXiv:1509.09308): y = A' [U * (B' d B)] A.
//
// A thread takes a block of tiles that fits its cache: transforms their input into panels, one set per point of the
// transformed domain; then, for 2 vectors of output channels at a time, multiplies at every point and transforms back,
// with shift, residual and ReLU in the last step. Neither transformed image ever exists as a whole.
#pragma once

#include "conv.h"
#include "tile.h"
#include "weights.h"
#include "winograd_filters.h"
#include "work.h"

namespace RF_VARIANT {

// The way back through stride 2 and padding 1.
static bool upsampling_supports(const rf_shape& s) {
  return s.stride_h == -2 && s.pad_h == 0 && s.pad_w == 0 && (s.p + 1) / 2 == s.h && (s.q + 1) / 2 == s.w;
}

static bool winograd_supports(const rf_shape& s) {
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

// A convolution, or a rectangle of its outputs, which is the same in all images.
struct WinogradTask : ConvTask<Float32> {
  int64_t pixel;  // floats that an input pixel takes up, at least its channels
  Range high, wide;

  explicit WinogradTask(const ConvTask<Float32>& conv)
      : ConvTask<Float32>(conv), pixel(shape.c), high{0, shape.p}, wide{0, shape.q} {}
};

// The filters for columns, and for rows, of tiles.
template <class FP, class FQ> struct Winograd {
  static_assert(FP::WEIGHTS == FQ::WEIGHTS && FP::STRIDE == FQ::STRIDE);
  static constexpr int POINTS = FP::POINTS * FQ::POINTS, WEIGHTS = FP::WEIGHTS;

  // Which of the transformed weights a point is multiplied by.
  static int64_t weights_of(int point) {
    return FP::weight_of(point / FQ::POINTS) * WEIGHTS + FQ::weight_of(point % FQ::POINTS);
  }

  struct Task : WinogradTask {
    int64_t tiles_high, tiles_wide, lines;  // lines: of VL input channels

    explicit Task(const WinogradTask& task)
        : WinogradTask(task), tiles_high(ceil_div(high.end - high.begin, FP::OUT)),
          tiles_wide(ceil_div(wide.end - wide.begin, FQ::OUT)), lines(ceil_div(shape.c, VL)) {}
    int64_t tiles() const { return shape.n * tiles_high * tiles_wide; }
  };

  struct Place {  // of a tile
    int64_t image;
    int p, q;
  };
  static Place place(const Task& task, int64_t tile) {
    const int64_t per_image = task.tiles_high * task.tiles_wide, at = tile % per_image;
    return {tile / per_image, int(task.high.begin + at / task.tiles_wide * FP::OUT),
            int(task.wide.begin + at % task.tiles_wide * FQ::OUT)};
  }

  // Input transform of one tile into its row of the panels; `v` at that row, `line_step` floats from a line of channels
  // to the next, `point_step` from point to point.
  static void transform_input(const Task& task, int64_t tile, float* v, int64_t line_step, int64_t point_step) {
    const rf_shape& s = task.shape;
    const Place at = place(task, tile);
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
        for (int j = 0; j < FQ::POINTS; j++) store(v + (i * FQ::POINTS + j) * point_step, row[j]);
      }
    }
  }

  // Output transform of one tile for one vector of channels, from `m`, `point_step` floats from point to point.
  static void transform_output(const Task& task, int64_t tile, const float* m, int64_t point_step, int channel) {
    const rf_shape& s = task.shape;
    const Place at = place(task, tile);
    const int channels = smaller(VL, s.k - channel);
    vec half[FP::OUT][FQ::POINTS];
#pragma GCC unroll 9
    for (int j = 0; j < FQ::POINTS; j++) {
      vec column[FP::POINTS], out[FP::OUT];
#pragma GCC unroll 9
      for (int i = 0; i < FP::POINTS; i++) column[i] = load(m + (i * FQ::POINTS + j) * point_step);
      FP::output(column, out);
#pragma GCC unroll 8
      for (int i = 0; i < FP::OUT; i++) half[i][j] = out[i];
    }
    const int high = smaller(FP::OUT, int(task.high.end) - at.p), wide = smaller(FQ::OUT, int(task.wide.end) - at.q);
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
      for (int64_t i = 0; i < rows; i++)
        transform_input(task, range.begin + first + i, v + first * task.lines * VL + i * VL, rows * VL, v_point);
    }
    for (int64_t j = columns.begin; j < columns.end; j++) {
      const int channel = int(j * NR), channels = smaller(NR, s.k - channel), width = channels > VL ? NR : VL;
      const float* u = task.packed + int64_t(WEIGHTS) * WEIGHTS * s.c * channel;
      for (int point = 0; point < POINTS; point++) {
        const float* weights = u + weights_of(point) * s.c * width;
        const bool more = width == NR && point + 1 < POINTS && weights_of(point + 1) != weights_of(point);
        const float* next = more ? u + weights_of(point + 1) * s.c * width : nullptr;
        for (int64_t i = 0; i < panel_count; i++) {
          const int64_t first = panels.begin(i);
          const int rows = int(panels.begin(i + 1) - first);
          multiply(Tile<Float32>{panel(v + point * v_point + first * task.lines * VL, rows, s.c), weights,
                                 m + point * m_point + first * width, width, nullptr, nullptr, false, width,
                                 Ahead::share(next, i, panel_count), nullptr},
                   rows);
        }
      }
      for (int64_t i = 0; i < panels.rows; i++)
        for (int part = 0; part < channels; part += VL)
          transform_output(task, range.begin + i, m + i * width + part, m_point, channel + part);
    }
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

  // Whether what whole tiles leave over is cut into tiles of its own. They are products of their own too, which read
  // the weights again: not worth it for less than half a register tile of corners.
  static bool edges(const rf_shape& s) { return OUT == 4 && STRIDE > 0 && s.n >= MR / 2; }

  static int64_t products(const rf_shape& s) { return s.n * points(s, s.p) * points(s, s.q); }
  static int64_t points(const rf_shape& s, int length) {
    int64_t points = 0;
    each_part(s, length, [&](auto filter, Range part) {
      points += ceil_div(part.end - part.begin, filter.OUT) * filter.POINTS;
    });
    return points;
  }

  static void conv(const ConvTask<Float32>& conv_task, Team team) {
    WinogradTask task(conv_task);
    const rf_shape& s = task.shape;
    each_part(s, s.p, [&](auto filter_p, Range high) {
      each_part(s, s.q, [&](auto filter_q, Range wide) {
        task.high = high, task.wide = wide;
        Winograd<decltype(filter_p), decltype(filter_q)>::conv(task, team);
      });
    });
  }

  // Calls use(filter, range) for whole tiles, and for what is left if that has tiles of its own.
  template <class Use> static void each_part(const rf_shape& s, int64_t length, Use use) {
    const int64_t left = edges(s) ? length % OUT : 0, whole = length - left;
    use(F(), Range{0, whole});
    if constexpr (OUT == 4 && STRIDE > 0) {
      if (left == 3) use(Edge<3, STRIDE>(), Range{whole, length});
      if (left == 1 || left == 2) use(Edge<2, STRIDE>(), Range{whole, length});
    }
  }
};

}  // namespace RF_VARIANT
