// Vectors of VL floats in GCC's vector extensions: one source for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace RF_VARIANT {

#if defined(__AVX512F__)
constexpr int VL = 16;
constexpr int MR = 14;  // rows of a register tile: 2 MR accumulators, 2 weights and a broadcast fill the registers
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 6;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int MR = 12;
#else
constexpr int VL = 4;
constexpr int MR = 6;
#endif
constexpr int NV = 2;  // vectors of output channels in a register tile
constexpr int NR = NV * VL;

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec v) { *(vec_u*)p = v; }
static inline vec splat(float f) { return f - vec{}; }

// Keeps a broadcast in a register: folded into each multiply-add as a memory operand, it would be loaded once per use.
static inline vec in_register(vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

static inline vec relu(vec v) { return v < vec{} ? vec{} : v; }  // NaN stays

static inline vec load_part(const float* p, int count) {
  alignas(sizeof(vec)) float lanes[VL] = {};
  for (int i = 0; i < count; i++) lanes[i] = p[i];
  return load(lanes);
}
static inline void store_part(float* p, vec v, int count) {
  alignas(sizeof(vec)) float lanes[VL];
  store(lanes, v);
  for (int i = 0; i < count; i++) p[i] = lanes[i];
}

template <class T> static inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> static inline T larger(T a, T b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace RF_VARIANT
