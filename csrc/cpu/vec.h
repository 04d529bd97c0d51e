// A vector of compute-type elements, for one instruction tier.
//
// A tier's unit defines FUSEDOPT_TIER (its namespace) and FUSEDOPT_VECTOR_BYTES, and includes this
// header after switching the compiler to its instruction set. Everything here lives in the tier's
// namespace: template instantiations of different tiers have different names, so that the linker
// can never hand one tier's code to another. Arithmetic uses the compiler's vector extension;
// intrinsics appear only where it has no operator (roots, fp16) or where g++ 12 expands one badly
// (words in and out of the halves of others, floats to doubles).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

#define FUSEDOPT_INLINE __attribute__((always_inline)) inline

namespace fusedopt::FUSEDOPT_TIER {

template <class T, int kLaneCount>
struct Native {
  typedef T Type __attribute__((vector_size(kLaneCount * sizeof(T)), aligned(alignof(T))));
};

template <class T>
struct Vec {
  static constexpr int kLanes = FUSEDOPT_VECTOR_BYTES / sizeof(T);
  typedef T Lanes __attribute__((vector_size(FUSEDOPT_VECTOR_BYTES)));
  Lanes lanes;

  FUSEDOPT_INLINE friend Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  FUSEDOPT_INLINE friend Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  FUSEDOPT_INLINE friend Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  FUSEDOPT_INLINE friend Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  FUSEDOPT_INLINE friend Vec operator+(Vec a, T b) { return {a.lanes + b}; }
  FUSEDOPT_INLINE friend Vec operator*(Vec a, T b) { return {a.lanes * b}; }
  FUSEDOPT_INLINE friend Vec operator*(T a, Vec b) { return {a * b.lanes}; }

  FUSEDOPT_INLINE friend Vec max(Vec a, Vec b) {
    return {(a.lanes > b.lanes) | (a.lanes != a.lanes) ? a.lanes : b.lanes};
  }

  FUSEDOPT_INLINE friend Vec sqrt(Vec a) {
#if defined(__x86_64__)
#if FUSEDOPT_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      return {(Lanes)_mm512_maskz_sqrt_ps(0xffff, (__m512)a.lanes)};
    } else {
      return {(Lanes)_mm512_maskz_sqrt_pd(0xff, (__m512d)a.lanes)};
    }
#elif FUSEDOPT_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) {
      return {(Lanes)_mm256_sqrt_ps((__m256)a.lanes)};
    } else {
      return {(Lanes)_mm256_sqrt_pd((__m256d)a.lanes)};
    }
#else
    if constexpr (sizeof(T) == 4) {
      return {(Lanes)_mm_sqrt_ps((__m128)a.lanes)};
    } else {
      return {(Lanes)_mm_sqrt_pd((__m128d)a.lanes)};
    }
#endif
#else
    for (int i = 0; i < kLanes; ++i) a.lanes[i] = fusedopt::sqrt(a.lanes[i]);
    return a;
#endif
  }
};

// Loads and stores of kLanes elements at any alignment, converting from and to the storage type.
FUSEDOPT_INLINE Vec<float> load(const float* from) {
  Vec<float> v;
  __builtin_memcpy(&v.lanes, from, sizeof v.lanes);
  return v;
}
FUSEDOPT_INLINE void store(float* to, Vec<float> v) {
  __builtin_memcpy(to, &v.lanes, sizeof v.lanes);
}
FUSEDOPT_INLINE Vec<double> load(const double* from) {
  Vec<double> v;
  __builtin_memcpy(&v.lanes, from, sizeof v.lanes);
  return v;
}
FUSEDOPT_INLINE void store(double* to, Vec<double> v) {
  __builtin_memcpy(to, &v.lanes, sizeof v.lanes);
}

constexpr int kFloats = Vec<float>::kLanes;

using HalfFloats = Native<float, kFloats / 2>::Type;

FUSEDOPT_INLINE Vec<double> to_doubles(HalfFloats half) {
#if defined(__x86_64__) && FUSEDOPT_VECTOR_BYTES == 64
  return {(Vec<double>::Lanes)_mm512_maskz_cvtps_pd(0xff, (__m256)half)};
#elif defined(__x86_64__) && FUSEDOPT_VECTOR_BYTES == 32
  return {(Vec<double>::Lanes)_mm256_cvtps_pd((__m128)half)};
#else
  return {__builtin_convertvector(half, Vec<double>::Lanes)};
#endif
}
// The lanes as doubles, in order.
FUSEDOPT_INLINE void to_doubles(Vec<float> v, Vec<double>* to) {
  HalfFloats halves[2];
  __builtin_memcpy(halves, &v.lanes, sizeof halves);
  for (int h = 0; h < 2; ++h) to[h] = to_doubles(halves[h]);
}
FUSEDOPT_INLINE void to_doubles(Vec<double> v, Vec<double>* to) { *to = v; }

using Words = Native<uint32_t, kFloats>::Type;
using HalfWords = Native<uint16_t, kFloats>::Type;

// 16-bit words to the upper halves of 32-bit words, and back.
#if FUSEDOPT_VECTOR_BYTES == 64
using Halves = Native<uint16_t, 2 * kFloats>::Type;
FUSEDOPT_INLINE Words to_upper_halves(HalfWords half) {
  return (Words)__builtin_shufflevector(half, HalfWords{}, 16, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5,
                                        16, 6, 16, 7, 16, 8, 16, 9, 16, 10, 16, 11, 16, 12, 16, 13,
                                        16, 14, 16, 15);
}
FUSEDOPT_INLINE HalfWords upper_halves(Words words) {
  return __builtin_shufflevector((Halves)words, (Halves)words, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19,
                                 21, 23, 25, 27, 29, 31);
}
#else
FUSEDOPT_INLINE Words to_upper_halves(HalfWords half) {
  return __builtin_convertvector(half, Words) << 16;
}
FUSEDOPT_INLINE HalfWords upper_halves(Words words) {
  return __builtin_convertvector(words >> 16, HalfWords);
}
#endif

FUSEDOPT_INLINE Vec<float> load(const BF16* from) {
  HalfWords half;
  __builtin_memcpy(&half, from, sizeof half);
  return {(Vec<float>::Lanes)to_upper_halves(half)};
}

// The rounding of Narrow<BF16>, a vector at a time: half a unit is added, and where that made a tie,
// which leaves zeros below, an odd result steps back. Not vcvtneps2bf16: it flushes subnormals.
FUSEDOPT_INLINE void store(BF16* to, Vec<float> v) {
  const Words bits = (Words)v.lanes;
  const Words up = bits + 0x8000u;
  const Words rounded = (up & 0xffffu) == 0 ? up & ~0x10000u : up;
  const Words quiet_nan = bits | 0x400000u;
  const HalfWords half = upper_halves(v.lanes != v.lanes ? quiet_nan : rounded);
  __builtin_memcpy(to, &half, sizeof half);
}

#if FUSEDOPT_VECTOR_BYTES == 64
FUSEDOPT_INLINE Vec<float> load(const F16* from) {
  return {
      (Vec<float>::Lanes)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from))};
}
FUSEDOPT_INLINE void store(F16* to, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)to,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
#elif FUSEDOPT_VECTOR_BYTES == 32
FUSEDOPT_INLINE Vec<float> load(const F16* from) {
  return {(Vec<float>::Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from))};
}
FUSEDOPT_INLINE void store(F16* to, Vec<float> v) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v.lanes, _MM_FROUND_TO_NEAREST_INT));
}
#else
FUSEDOPT_INLINE Vec<float> load(const F16* from) {
  Vec<float> v;
  for (int i = 0; i < kFloats; ++i) v.lanes[i] = widen(from[i]);
  return v;
}
FUSEDOPT_INLINE void store(F16* to, Vec<float> v) {
  for (int i = 0; i < kFloats; ++i) to[i] = Narrow<F16>::from(v.lanes[i]);
}
#endif

// As many elements as a vector of the compute type has, as doubles.
template <class Storage>
FUSEDOPT_INLINE void load_doubles(const Storage* from, Vec<double>* to) {
  to_doubles(load(from), to);
}
FUSEDOPT_INLINE void load_doubles(const float* from, Vec<double>* to) {
  for (int h = 0; h < 2; ++h) {  // an instruction each, out of memory
    HalfFloats half;
    __builtin_memcpy(&half, from + h * (kFloats / 2), sizeof half);
    to[h] = to_doubles(half);
  }
}

}  // namespace fusedopt::FUSEDOPT_TIER

namespace fusedopt {
template <class T>
struct ScalarOf<FUSEDOPT_TIER::Vec<T>> {
  using Type = T;
};
}  // namespace fusedopt
