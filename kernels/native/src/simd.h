// Vectors of VL floats in GCC's vector extensions: one source for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
constexpr int LINE = 64 / sizeof(float);  // floats in a line of the cache

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec v) { *(vec_u*)p = v; }
static inline vec splat(float f) { return f - vec{}; }

// Keeps a broadcast in a register: folded into each multiply-add as a memory operand, it would be loaded once per use.
template <class V> static inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

#if defined(__AVX512F__)
constexpr __mmask16 ALL_LANES = -1;  // GCC 12 warns of the intrinsics without a mask
#endif

// The larger, or smaller, of two; the second of them if one is NaN. As GCC does not see that the comparison is one
// instruction on x86, it is named.
static inline vec max_or_second(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_max_ps(ALL_LANES, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline vec min_or_second(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_min_ps(ALL_LANES, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static inline vec relu(vec v) { return max_or_second(vec{}, v); }  // NaN stays

// sum + x * w, rounded once where the instruction set has that. Nothing else is: the compiler may not fuse what is written
// apart (-ffp-contract=off in setup.py), since it would in one copy of a loop and not in another, and a value's last bits
// would depend on the tile that it came in.
static inline vec multiply_add(vec sum, vec x, vec w) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#elif defined(__aarch64__)
  return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)w);
#else
  return sum + x * w;
#endif
}

static inline vec multiply_add(vec sum, float x, vec w) { return multiply_add(sum, splat(x), w); }

// What the kernels multiply, and what images hold. A "unit" is 32 bits wide: what a lane of a vector takes at a time.
struct Float32 {
  using Element = float;  // of images
  using Packed = float;   // a lane of packed weights
  using Sum = vec;
  static constexpr int PER_UNIT = 1;
  static constexpr bool DIRECT = true, WINOGRAD = true;  // whether these algorithms have it
  static constexpr int START_ROWS = 0;  // of packed weights, what sums begin with; none: with 0
  static constexpr int32_t ZEROS = 0;   // a unit of a panel whose elements are 0
  using Placed = float;                 // an element in a panel
  static inline float placed(float f) { return f; }
  static inline vec broadcast(const char* unit) { return splat(*(const float*)unit); }
  static inline vec multiply_add(vec sum, vec x, vec w) { return RF_VARIANT::multiply_add(sum, x, w); }
  static inline vec load_weights(const float* p) { return RF_VARIANT::load(p); }
  static inline void put_line(float* to, const float* from) { RF_VARIANT::store(to, RF_VARIANT::load(from)); }
  static inline vec load(const float* p) { return RF_VARIANT::load(p); }
  static inline void store(float* p, vec v) { RF_VARIANT::store(p, v); }
  static inline float widen(float f) { return f; }
  static inline float narrow(float f) { return f; }
};

#if defined(__AVX512BF16__)
typedef uint16_t halves_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));

struct BFloat16 {
  using Element = uint16_t;
  using Packed = float;
  using Sum = vec;
  static constexpr int PER_UNIT = 2;
  static constexpr bool DIRECT = false, WINOGRAD = false;
  static constexpr int START_ROWS = 0;
  static constexpr int32_t ZEROS = 0;
  static inline vec broadcast(const char* unit) {
    int32_t bits;
    memcpy(&bits, unit, sizeof bits);
    return (vec)(bits - ivec{});
  }
  // Both products of a lane's pair are added, in float32.
  static inline vec multiply_add(vec sum, vec x, vec w) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static inline vec load_weights(const float* p) { return RF_VARIANT::load(p); }
  static inline void put_line(float* to, const uint16_t* from) {
    RF_VARIANT::store(to, RF_VARIANT::load((const float*)from));
  }
  static inline vec load(const uint16_t* p) {
    return (vec)(__builtin_convertvector(*(const halves_u*)p, ivec) << 16);
  }
  static inline void store(uint16_t* p, vec v) {
    *(halves_u*)p = (halves_u)_mm512_cvtneps_pbh((__m512)v);
  }
  static inline float widen(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return f;
  }
  static inline uint16_t narrow(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, sizeof f);
    if (f != f) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};
#endif

template <class E> static inline vec load_part(const typename E::Element* p, int count) {
  alignas(sizeof(vec)) float lanes[VL] = {};
  for (int i = 0; i < count; i++) lanes[i] = E::widen(p[i]);
  return load(lanes);
}
template <class E> static inline void store_part(typename E::Element* p, vec v, int count) {
  alignas(sizeof(vec)) float lanes[VL];
  store(lanes, v);
  for (int i = 0; i < count; i++) p[i] = E::narrow(lanes[i]);
}
// The first `count` lanes, at most all.
template <class E> static inline vec load_some(const typename E::Element* p, int count) {
  return count >= VL ? E::load(p) : load_part<E>(p, count);
}
template <class E> static inline void store_some(typename E::Element* p, vec v, int count) {
  if (count >= VL)
    E::store(p, v);
  else
    store_part<E>(p, v, count);
}

template <class T> static constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <class T> static constexpr T larger(T a, T b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace RF_VARIANT
