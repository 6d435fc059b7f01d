// What an instruction set's compilation offers to dispatch.cpp.
#pragma once

#include "abi.h"

struct Variant {
  const char* name;
  int (*supports)(const rf_shape*, int algorithm);
  int64_t (*packed_bytes)(const rf_shape*, int algorithm);
  void (*pack)(const rf_shape*, int algorithm, const double* weight, void* packed);
  // One thread's share of an operation.
  void (*run)(const rf_op*, void* const* buffers, int thread, int threads);
};
