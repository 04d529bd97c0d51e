// The ring that uploads pass through, over a runtime library whose copies are made when the test says
// so: what is being read is never written again, nothing waits, and errors are told.
#include <algorithm>

#include "check.h"
#include "device/graph_runtime.h"
#include "fake_runtime.h"

namespace {

using namespace fusedopt::device;

constexpr size_t kPlaceBytes = 64;
constexpr size_t kPlaces = 3;
long checked = 0;

struct Bench {
  std::vector<std::byte> pinned = std::vector<std::byte>(kPlaceBytes * kPlaces);
  UploadRing ring{pinned.data(), kPlaceBytes, kPlaces};
  std::vector<std::byte> image = std::vector<std::byte>(256);
  std::vector<std::byte> device = std::vector<std::byte>(256);
  Status status = nullptr;

  void fill(int value) { std::fill(image.begin(), image.end(), std::byte(value)); }
  bool send(const std::vector<Range>& ranges) {
    return ring.send(device.data(), image.data(), ranges, nullptr, status);
  }
};

void test_ranges() {
  Bench bench;
  bench.fill(1);
  checked += 6;
  CHECK(bench.send({{8, 24}, {100, 132}}), "two ranges that fit");
  bench.fill(2);  // the image may change at once
  CHECK(fake_run(9) == 2, "a copy a range");
  for (size_t i = 0; i < bench.device.size(); ++i) {
    const bool sent = (i >= 8 && i < 24) || (i >= 100 && i < 132);
    ++checked;
    CHECK(bench.device[i] == std::byte(sent ? 1 : 0), "byte " + std::to_string(i));
  }
  CHECK(bench.send({}) && fake_run(9) == 0, "nothing to send");
  CHECK(!bench.send({{0, kPlaceBytes + 1}}) && fake_run(9) == 0, "more than a place holds");
  CHECK(!bench.send({{0, 40}, {50, 75}}) && fake_run(9) == 0, "both together are more");
  CHECK(bench.send({{0, kPlaceBytes}}) && fake_run(9) == 1, "just a place");
}

void test_what_is_being_read_is_not_written() {
  Bench bench;
  const auto at = [](size_t i) { return Range{4 * i, 4 * i + 4}; };
  checked += 5;
  for (size_t i = 0; i < kPlaces; ++i) {
    bench.fill(int(i) + 1);
    ++checked;
    CHECK(bench.send({at(i)}), "a free place");
  }
  bench.fill(99);
  CHECK(!bench.send({at(9)}), "all places are being read");
  CHECK(fake_errors() == 0, "no error is left for others to find");
  CHECK(fake_run(1) == 1, "the first copy is made");
  bench.fill(4);
  CHECK(bench.send({at(kPlaces)}), "its place is free again");
  CHECK(!bench.send({at(9)}), "the next one is not");
  fake_run(9);
  for (size_t i = 0; i <= kPlaces; ++i) {
    ++checked;
    CHECK(bench.device[4 * i] == std::byte(i + 1), "copy " + std::to_string(i));
  }
}

void test_errors() {
  Bench bench;
  fake_fail(700);
  checked += 3;
  CHECK(bench.send({{0, 8}}) && bench.status != nullptr, "a copy that fails");
  CHECK(bench.send({{0, 8}}) && bench.status == nullptr, "the next one does not");
  CHECK(fake_run(9) == 1, "and it alone is made");
}

}  // namespace

int main() {
  ++checked;
  CHECK(std::string(gpu_runtime()).find("libcudart.so") != std::string::npos, "the library");
  test_ranges();
  test_what_is_being_read_is_not_written();
  test_errors();
  return check::finish("gpu_test", checked);
}
