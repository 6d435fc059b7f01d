// A convolution with its operands, as every algorithm gets it.
#pragma once

#include "abi.h"
#include "simd.h"

namespace RF_VARIANT {

template <class E> struct ConvTask {
  using Element = typename E::Element;

  const rf_shape& shape;
  const Element* x;
  const float* packed;  // units
  const float* shift;
  const Element* residual;  // at output pixel 0; null: none
  Element* y;               // at output pixel `y_row`
  int64_t y_row;
};

}  // namespace RF_VARIANT
