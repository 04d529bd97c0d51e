// An independent reference for bf16 and fp16: values by ldexp, rounding by nearbyint in double. It
// shares nothing with core/dtype.h, which works on bit patterns.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace bits16 {

struct Format {
  int mantissa_bits;
  int lowest_exponent;   // of the smallest normal number
  int highest_exponent;  // of the largest finite number
};
constexpr Format kBF16{7, -126, 127};
constexpr Format kF16{10, -14, 15};

inline double decode(const Format& f, uint16_t bits) {
  const int exponent_mask = (1 << (15 - f.mantissa_bits)) - 1;
  const int exponent = (bits >> f.mantissa_bits) & exponent_mask;
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  double value;
  if (exponent == exponent_mask) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, f.lowest_exponent - f.mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << f.mantissa_bits),
                       f.lowest_exponent + exponent - 1 - f.mantissa_bits);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

// The number of the format nearest to x, ties to even, as a double; overflow gives infinity.
inline double nearest(const Format& f, double x) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);  // |x| in [2^(exponent - 1), 2^exponent)
  const int lowest = exponent - 1 < f.lowest_exponent ? f.lowest_exponent : exponent - 1;
  const int unit = lowest - f.mantissa_bits;
  // Scaling by powers of two is exact in double for every float, and nearbyint rounds ties to even.
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  if (std::fabs(rounded) < std::ldexp(1.0, f.highest_exponent + 1)) return rounded;
  return std::copysign(std::numeric_limits<double>::infinity(), x);
}

// Equal as values, zeros by sign; any NaN is any other.
inline bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

// Calls `visit` with floats that decide a rounding: around every number of the format and around
// the middle between it and the next one, and with a sweep through all bit patterns.
template <class Visit>
void for_each_deciding_float(const Format& f, const Visit& visit) {
  const auto around = [&](double x) {
    const float middle = static_cast<float>(x);
    visit(middle);
    visit(std::nextafter(middle, std::numeric_limits<float>::infinity()));
    visit(std::nextafter(middle, -std::numeric_limits<float>::infinity()));
  };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double here = decode(f, static_cast<uint16_t>(bits));
    const double next = decode(f, static_cast<uint16_t>(bits + 1));
    if (std::isnan(here)) continue;
    around(here);
    if (std::isfinite(here) && std::isfinite(next)) around((here + next) / 2);
    // Beyond the largest number: half a unit further it rounds to infinity.
    if (std::isfinite(here) && std::isinf(next)) {
      around(here + (here - decode(f, static_cast<uint16_t>(bits - 1))) / 2);
    }
  }
  for (uint64_t bits = 0; bits < 0x100000000; bits += 1021) {  // a prime: all low bits occur
    const auto pattern = static_cast<uint32_t>(bits);
    float x;
    static_assert(sizeof x == sizeof pattern);
    __builtin_memcpy(&x, &pattern, sizeof x);
    visit(x);
  }
}

}  // namespace bits16
