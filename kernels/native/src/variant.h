// What an instruction set's compilation and dispatch.cpp offer each other.
#pragma once

#include <cstddef>

#include "abi.h"

// Memory of a thread's own, kept for its next call. Slots are apart from each other.
enum Slot { PANELS, ROWS, IMAGE, PARTIALS, SLOTS };

// At least `bytes`, aligned to 64 bytes.
void* rf_scratch(Slot slot, size_t bytes);
// Bytes of the second-level cache.
int64_t rf_cache_bytes();

// Arguments of rf_wgrad and rf_gram.
struct WgradCall {
  const rf_shape& shape;
  int algorithm;
  const float *dy, *x, *scale, *shift;
  float* dw;
};
struct GramCall {
  const rf_shape& shape;
  const float *x, *scale, *shift;
  float *mean, *covariance;
};

class Barrier;

template <class T> static inline T* rf_place(const rf_ref& ref, void* const* buffers) {
  return ref.buffer < 0 ? nullptr : (T*)((char*)buffers[ref.buffer] + ref.offset);
}

// int8, and the way there and back.
struct Int8Variant {
  int (*supports)(const rf_shape*, int algorithm);
  int64_t (*packed_bytes)(const rf_shape*, int algorithm);
  void (*pack)(const rf_shape*, int algorithm, const rf_weight*, void* packed, int thread, int threads);
  void (*run)(const rf_op*, void* const* buffers, int thread, int threads);
};

// Floating-point numbers.
struct Variant {
  int (*supports)(const rf_shape*, int algorithm);
  int64_t (*products)(const rf_shape*, int algorithm);
  int64_t (*packed_bytes)(const rf_shape*, int algorithm);
  // One thread's share of packing.
  void (*pack)(const rf_shape*, int algorithm, const rf_weight*, void* packed, int thread, int threads);
  // Floating-point operations of `rounds` rounds of independent multiply-adds on registers: the fastest this CPU can do.
  double (*multiply_adds)(int64_t rounds);
  // One number for the bytes of some pieces.
  uint64_t (*digest)(const rf_pieces*);
  // One thread's share of an operation.
  void (*run)(const rf_op*, void* const* buffers, int thread, int threads);
  // One thread's share of a pass; how many partial sums it makes; its share of adding them up, when all have made them.
  void (*pass)(const rf_pass*, double* partials, int thread, int threads);
  int64_t (*pass_partials)(const rf_pass*);
  void (*finish_pass)(const rf_pass*, const double* partials, int thread, int threads);

  // Weight gradients and covariances: the memory that the threads share, and one thread's part of the work.
  int (*wgrad_supports)(const rf_shape*, int algorithm);
  size_t (*wgrad_bytes)(const WgradCall&);
  void (*wgrad)(const WgradCall&, void* workspace, int thread, int threads, Barrier&);
  size_t (*gram_bytes)(const GramCall&);
  void (*gram)(const GramCall&, void* workspace, int thread, int threads, Barrier&);
};
