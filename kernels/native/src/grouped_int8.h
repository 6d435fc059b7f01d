// Grouped convolution of int8 with 4, 8 or 16 channels per group, in and out: a vector holds whole groups of results,
// so one shuffle gives every lane a unit of its group's pixel.
#pragma once

#include "requantise.h"
#include "weights.h"
#include "work_sharing.h"

namespace RF_VARIANT {

static bool grouped_int8_supports(const rf_shape& s) {
  const int width = s.c / s.groups;
  return s.groups > 1 && s.k == s.c && (width == 4 || width == 8 || width == 16) && width <= VL && s.c % VL == 0 &&
         !s.pool;
}

// Packed weights: [vector of channels][what sums begin with, if anything; r, s, unit within the group][VL].
static int64_t grouped_int8_rows(const rf_shape& s) {
  return Int8::START_ROWS + int64_t(s.r) * s.s * (s.c / s.groups / Int8::PER_UNIT);
}
static int64_t grouped_int8_packed_bytes(const rf_shape& s) {
  return grouped_int8_rows(s) * s.k * int64_t(sizeof(Int8::Packed));
}

static void grouped_int8_pack(const WeightSource& from, Int8::Packed* packed, Team team) {
  const int width = from.inputs(), taps = from.taps();
  const int64_t rows = grouped_int8_rows(from.shape);
  auto* block = (double*)rf_scratch(PANELS, int64_t(taps) * width * VL * sizeof(double));
  const Range mine = share(from.shape.k / VL, team.thread, team.threads);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    from.block(int(i * VL), VL, 0, width, block);
    int32_t sums[VL] = {};
    for (int64_t j = 0; j < int64_t(taps) * width; j++) {
      auto* row = (int8_t*)(packed + (i * rows + Int8::START_ROWS + j / Int8::PER_UNIT) * VL);
      put_weights<Int8>(row + j % Int8::PER_UNIT, block + j * VL);
      for (int lane = 0; lane < VL; lane++) sums[lane] += int32_t(block[j * VL + lane]);
    }
    for (int lane = 0; Int8::START_ROWS && lane < VL; lane++) ((int32_t*)packed)[i * rows * VL + lane] = -128 * sums[lane];
  }
}

// Unit number UNIT of every lane's group, from the units of VL channels.
template <int WIDTH, int NUMBER> static inline ivec spread_units(ivec units) {
  constexpr int UNITS = WIDTH / Int8::PER_UNIT;
#if defined(__clang__)
  ivec result;
  for (int i = 0; i < VL; i++) result[i] = units[i / WIDTH * UNITS + NUMBER];
  return result;
#else
  ivec lanes;
  for (int i = 0; i < VL; i++) lanes[i] = i / WIDTH * UNITS + NUMBER;
  return __builtin_shuffle(units, lanes);
#endif
}

template <int WIDTH, int NUMBER = 0> static inline ivec multiply_units(ivec sum, ivec units, const Int8::Packed* w) {
  if constexpr (NUMBER * Int8::PER_UNIT == WIDTH) {
    return sum;
  } else {
    sum = Int8::multiply_add(sum, spread_units<WIDTH, NUMBER>(units), Int8::load_weights(w + NUMBER * VL));
    return multiply_units<WIDTH, NUMBER + 1>(sum, units, w);
  }
}

template <int WIDTH> static void grouped_int8_conv(const ConvTask<Int8>& task, Team team) {
  const rf_shape s = task.shape;
  const Requantiser by(task.requantise, s.relu != 0, task.residual, task.y, s.k);
  const bool to_float = task.requantise.to_float;
  const int64_t rows = grouped_int8_rows(s);
  const Range mine = share(int64_t(s.n) * s.p, team.thread, team.threads);
  for (int64_t row = mine.begin; row < mine.end; row++) {
    const int8_t* image = task.x + row / s.p * s.h * s.w * s.c;
    const int top = int(row % s.p) * s.stride_h - s.pad_h;
    for (int base = 0; base < s.k; base += VL) {
      const Int8::Packed* weights = task.packed + base / VL * rows * VL;
      const vec scale = load(task.requantise.scale + base), shift = load(task.shift + base);
      for (int q = 0; q < s.q; q++) {
        const int left = q * s.stride_w - s.pad_w;
        const Int8::Packed* w = weights;
        ivec sum{};
        if constexpr (Int8::START_ROWS) sum = Int8::load_weights(w), w += VL;
        for (int r = 0; r < s.r; r++) {
          const int y = top + r * s.dilation_h;
          for (int t = 0; t < s.s; t++, w += WIDTH / Int8::PER_UNIT * VL) {
            const int x = left + t * s.dilation_w;
            const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
            const ivec units = inside ? Int8::load_units(image + (int64_t(y) * s.w + x) * s.c + base) : ivec{} + Int8::ZEROS;
            sum = multiply_units<WIDTH>(sum, units, w);
          }
        }
        by.finish((row * s.q + q) * s.k + base, sum, scale, shift, to_float);
      }
    }
  }
}

static void grouped_int8(const ConvTask<Int8>& task, Team team) {
  switch (task.shape.c / task.shape.groups) {
    case 4: return grouped_int8_conv<4>(task, team);
    case 8: if constexpr (VL >= 8) return grouped_int8_conv<8>(task, team);
    case 16: if constexpr (VL >= 16) return grouped_int8_conv<16>(task, team);
  }
}

}  // namespace RF_VARIANT
