// A convolution with its operands, as every algorithm gets it.
#pragma once

#include "abi.h"
#include "prologue.h"
#include "register_tile.h"

namespace RF_VARIANT {

// Where the pixels of a result go that are not side by side.
struct Spread {
  int32_t h, w, step_h, step_w;  // h = 0: they are

  // Of output pixel number `row`.
  int64_t pixel(const rf_shape& s, int64_t row) const {
    const int64_t line = row / s.q;
    return (line / s.p * h + line % s.p * step_h) * w + row % s.q * step_w;
  }
};

template <class E> struct ConvTask {
  using Element = typename E::Element;

  const rf_shape& shape;
  const Element* x;
  const typename E::Packed* packed;
  const float* shift;
  const Element* residual;  // at output pixel 0; null: none
  Element* y;               // at output pixel `y_row`
  int64_t y_row;
  Prologue prologue;
  Spread spread;
  Requantise requantise{};

  // Element number `at` of y.
  Element* y_at(int64_t at) const { return requantise.to_float ? (Element*)((float*)y + at) : y + at; }
};

}  // namespace RF_VARIANT
