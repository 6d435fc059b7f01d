// int8 images, multiplied exactly: by instructions that add up four products at a time where there are such, else by
// those that multiply pairs of 16 bits, which no product of 8 bits can overflow.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define RF_DOT_UNSIGNED  // four products of an unsigned byte by a signed one
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define RF_DOT_SIGNED
#elif defined(__x86_64__)
#define RF_DOT_PAIRS
#endif

namespace RF_VARIANT {

typedef int8_t bytes_u __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int32_t ivec_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));

static inline ivec rounded(vec v) {  // half to even; within 2^22
#if defined(__AVX512F__)
  return (ivec)_mm512_maskz_cvtps_epi32(ALL_LANES, (__m512)v);
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
  return (ivec)_mm_cvtps_epi32((__m128)v);
#elif defined(__aarch64__)
  return (ivec)vcvtnq_s32_f32((float32x4_t)v);
#else
  const vec magic = splat(0x1.8p23f);
  return (ivec)(in_register(v + magic)) - (ivec)magic;
#endif
}

// VL bytes as integers of 32 bits. (GCC converts element by element where a width is to grow by four.)
static inline ivec widened(const int8_t* p) {
#if defined(__AVX512F__)
  return (ivec)_mm512_maskz_cvtepi8_epi32(ALL_LANES, _mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(*(const bytes_u*)p, ivec);
#endif
}

// Integers from -128 to 127 as bytes; others on AVX-512 only, as the nearest of these.
static inline void put_bytes(int8_t* p, ivec v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtsepi32_epi8(ALL_LANES, (__m512i)v));
#elif defined(__AVX2__)
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(shorts, shorts));
#else
  *(bytes_u*)p = __builtin_convertvector(v, bytes_u);
#endif
}

// 2 VL bytes as integers of 16 bits.
static inline ivec widened_pairs(const void* p) {
#if defined(__AVX512BW__)
  return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int8_t pairs_u __attribute__((vector_size(VL * 2), aligned(1), may_alias));
  typedef int16_t pairs __attribute__((vector_size(VL * 4)));
  return (ivec)__builtin_convertvector(*(const pairs_u*)p, pairs);
#endif
}

struct Int8 {
  using Element = int8_t;
  using Sum = ivec;
  static constexpr bool DIRECT = true, WINOGRAD = false;

#if defined(RF_DOT_UNSIGNED) || defined(RF_DOT_SIGNED)
  static constexpr int PER_UNIT = 4;
  using Packed = int32_t;
#elif defined(RF_DOT_PAIRS)
  static constexpr int PER_UNIT = 2;  // of 16 bits in a panel, of 8 in the weights
  using Packed = int16_t;
#else
  static constexpr int PER_UNIT = 1;
  using Packed = int8_t;
#endif

#if defined(RF_DOT_UNSIGNED)
  // Panels hold x + 128, and sums begin with what that adds too much: a row before the weights.
  static constexpr int START_ROWS = 1;
  static constexpr int32_t ZEROS = int32_t(0x80808080);
#else
  static constexpr int START_ROWS = 0;
  static constexpr int32_t ZEROS = 0;
#endif

  static inline ivec broadcast(const char* unit) {
    int32_t bits;
    memcpy(&bits, unit, sizeof bits);
    return bits - ivec{};
  }

  static inline ivec load_weights(const Packed* p) {
#if defined(RF_DOT_PAIRS)
    return widened_pairs(p);
#elif defined(RF_DOT_UNSIGNED) || defined(RF_DOT_SIGNED)
    return *(const ivec_u*)p;
#else
    return widened((const int8_t*)p);
#endif
  }

  static inline ivec multiply_add(ivec sum, ivec x, ivec w) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(RF_DOT_UNSIGNED)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif defined(RF_DOT_SIGNED)
    return (ivec)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#elif defined(__AVX512BW__)
    return sum + (ivec)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
    return sum + (ivec)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(RF_DOT_PAIRS)
    return sum + (ivec)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return sum + x * w;
#endif
  }

  // An element as it is in a panel.
#if defined(RF_DOT_UNSIGNED)
  using Placed = uint8_t;
  static inline Placed placed(int8_t q) { return Placed(q) ^ 0x80; }
#elif defined(RF_DOT_SIGNED)
  using Placed = int8_t;
  static inline Placed placed(int8_t q) { return q; }
#elif defined(RF_DOT_PAIRS)
  using Placed = int16_t;
  static inline Placed placed(int8_t q) { return q; }
#else
  using Placed = int32_t;
  static inline Placed placed(int8_t q) { return q; }
#endif

  // VL units of a panel, from as many elements side by side.
  static inline void put_line(float* to, const int8_t* from) {
#if defined(RF_DOT_UNSIGNED)
    *(ivec_u*)to = *(const ivec_u*)from ^ ZEROS;
#elif defined(RF_DOT_SIGNED)
    *(ivec_u*)to = *(const ivec_u*)from;
#else
    *(ivec_u*)to = load_weights((const Packed*)from);
#endif
  }

  static inline vec load(const int8_t* p) {
    return __builtin_convertvector(widened(p), vec);
  }
  // Rounded half to even; NaN is the lowest number, as everything below it.
  static inline void store(int8_t* p, vec v) {
    v = min_or_second(splat(127), v);
#if !defined(__AVX512F__)  // where what is no int32, NaN too, becomes the lowest
    v = max_or_second(v, splat(-128));
#endif
    put_bytes(p, rounded(v));
  }
  static inline float widen(int8_t q) { return q; }
  static inline int8_t narrow(float f) {
    f = f > -128 ? f : -128;
    return int8_t(__builtin_lrintf(f < 127 ? f : 127));
  }
};

}  // namespace RF_VARIANT
