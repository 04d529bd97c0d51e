// Scalar conversions of core/dtype.h against an independent reference (bits16.h): widening for all
// 65,536 patterns, rounding for every float that decides one. Instruction tiers: driver_test.cpp.
#include "core/dtype.h"

#include "bits16.h"
#include "check.h"

namespace {

using namespace fusedopt;

long checked = 0;

std::string hex(uint32_t bits) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", bits);
  return text;
}

template <class Storage>
void test_format(const char* name, const bits16::Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const float wide = widen(Storage{pattern});
    ++checked;
    CHECK(bits16::same(wide, bits16::decode(format, pattern)),
          std::string(name) + ": widening pattern " + hex(bits));
    CHECK(std::signbit(wide) == (bits >= 0x8000),
          std::string(name) + ": sign of pattern " + hex(bits));
    CHECK(std::isnan(wide) || Narrow<Storage>::from(wide).bits == pattern,
          std::string(name) + ": widening and narrowing pattern " + hex(bits));
  }
  bits16::for_each_deciding_float(format, [&](float x) {
    const Storage got = Narrow<Storage>::from(x);
    ++checked;
    CHECK(bits16::same(bits16::decode(format, got.bits), bits16::nearest(format, x)),
          std::string(name) + ": rounding float " + hex(float_bits(x)) + " gave " + hex(got.bits));
    CHECK(((got.bits & 0x8000) != 0) == std::signbit(x),
          std::string(name) + ": sign of float " + hex(float_bits(x)));
  });
}

}  // namespace

int main() {
  test_format<BF16>("bfloat16", bits16::kBF16);
  test_format<F16>("float16", bits16::kF16);
  CHECK(Narrow<float>::from(1.5f) == 1.5f && Narrow<double>::from(1.5) == 1.5, "identity");
  return check::finish("dtype_test", checked);
}
