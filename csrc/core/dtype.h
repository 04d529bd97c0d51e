// Storage types, the tuples of them that kernels exist for, and scalar conversions to and from the
// compute type. Torch-free, host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/rule.h"

namespace fusedopt {

enum class DType : uint8_t { kF32, kF64, kBF16, kF16 };

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The arithmetic of a storage type: fp64 for fp64, fp32 for everything else.
template <class Storage>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};

template <DType>
struct StorageOf;
template <>
struct StorageOf<DType::kF32> {
  using Type = float;
};
template <>
struct StorageOf<DType::kF64> {
  using Type = double;
};
template <>
struct StorageOf<DType::kBF16> {
  using Type = BF16;
};
template <>
struct StorageOf<DType::kF16> {
  using Type = F16;
};

constexpr int item_size(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}
constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF64:
      return "float64";
    case DType::kBF16:
      return "bfloat16";
    default:
      return "float16";
  }
}

// The tuples (parameter, gradient, states) kernels are built for. All states of a row share a type.
// A test may define a shorter list.
#ifndef FUSEDOPT_FOR_EACH_STORAGE
#define FUSEDOPT_FOR_EACH_STORAGE(STORAGE) \
  STORAGE(kF32, kF32, kF32)                \
  STORAGE(kF64, kF64, kF64)                \
  STORAGE(kBF16, kBF16, kBF16)             \
  STORAGE(kBF16, kBF16, kF32)              \
  STORAGE(kBF16, kF32, kBF16)              \
  STORAGE(kBF16, kF32, kF32)               \
  STORAGE(kF16, kF16, kF16)                \
  STORAGE(kF16, kF16, kF32)                \
  STORAGE(kF16, kF32, kF16)                \
  STORAGE(kF16, kF32, kF32)
#endif

struct StorageTuple {
  DType param, grad, state;
};
constexpr bool operator==(StorageTuple a, StorageTuple b) {
  return a.param == b.param && a.grad == b.grad && a.state == b.state;
}

constexpr StorageTuple kStorageTuples[] = {
#define FUSEDOPT_TUPLE(P, G, S) {DType::P, DType::G, DType::S},
    FUSEDOPT_FOR_EACH_STORAGE(FUSEDOPT_TUPLE)
#undef FUSEDOPT_TUPLE
};
constexpr int kStorageTupleCount = sizeof(kStorageTuples) / sizeof(kStorageTuples[0]);

// The tuple's position in the list, -1 where no kernel is built for it.
constexpr int storage_index(StorageTuple tuple) {
  for (int i = 0; i < kStorageTupleCount; ++i) {
    if (kStorageTuples[i] == tuple) return i;
  }
  return -1;
}

FUSEDOPT_HD static uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FUSEDOPT_HD static float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FUSEDOPT_HD static float widen(float x) { return x; }
FUSEDOPT_HD static double widen(double x) { return x; }
FUSEDOPT_HD static float widen(BF16 x) { return bits_float(uint32_t(x.bits) << 16); }

// fp16 by its fields: normal numbers move their exponent, subnormals are exact products, infinities
// and NaN keep their mantissa (a NaN becomes quiet, as the F16C instructions make it).
FUSEDOPT_HD static float widen(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) {
    return bits_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
  }
  if (exponent == 0) {
    return bits_float(sign | float_bits(float(mantissa) * 0x1p-24f));
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class Storage>
struct Narrow;
template <>
struct Narrow<float> {
  FUSEDOPT_HD static float from(float x) { return x; }
};
template <>
struct Narrow<double> {
  FUSEDOPT_HD static double from(double x) { return x; }
};

// Round to nearest, ties to even: adding 0x7fff plus the last kept bit carries exactly when it must.
template <>
struct Narrow<BF16> {
  FUSEDOPT_HD static BF16 from(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};

// The same rounding for fp16. Below 2^-14 the kept bits are those of a subnormal: adding 0.5 puts
// them at the bottom of a float's mantissa, and the float addition rounds them to nearest even.
template <>
struct Narrow<F16> {
  FUSEDOPT_HD static F16 from(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return {uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
    }
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65,520 and above
    if (magnitude < 0x38800000u) {
      const uint32_t shifted = float_bits(bits_float(magnitude) + 0.5f);
      return {uint16_t(sign | (shifted - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
  }
};

}  // namespace fusedopt
