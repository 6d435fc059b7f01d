// What an instruction set's compilation offers to dispatch.cpp.
#pragma once

#include "abi.h"

struct Variant {
  const char* name;
  int (*supports)(const rf_shape*, int algorithm);
  int64_t (*packed_bytes)(const rf_shape*, int algorithm);
  void (*pack)(const rf_shape*, int algorithm, const double* weight, void* packed);
  // Floating-point operations of `rounds` rounds of independent multiply-adds on registers: the fastest this CPU can do.
  double (*multiply_adds)(int64_t rounds);
  // One thread's share of an operation.
  void (*run)(const rf_op*, void* const* buffers, int thread, int threads);
};
