#include "core/table.h"

#include <algorithm>

#include "core/norm.h"

namespace fusedopt {

namespace {

// What a piece costs whatever its length (table traffic, a call), counted in elements: a chunk of
// thousands of tiny rows closes before it has gathered its elements.
constexpr int64_t kPieceOverhead = 64;

// Rows are cut at multiples of this, so that no block of a norm and no vector of any instruction tier
// straddles a cut.
constexpr int64_t kCutGranularity = kNormBlock;

}  // namespace

int64_t Table::numel() const {
  int64_t total = 0;
  for (const Row& row : rows) total += row.numel;
  return total;
}

DType Table::dtype(int array) const {
  if (array == 0) return storage.param;
  if (array == 1) return storage.grad;
  if (array < 2 + kAccumulator) return storage.state;
  return storage.param == DType::kF64 ? DType::kF64 : DType::kF32;
}

bool Table::has(int array) const {
  if (array == 2 + kAccumulator) return accumulates;
  if (array == 2 + kAverage) return averages;
  return array < 2 + states;
}

void Table::cut(int64_t elements) {
  pieces.clear();
  chunks.clear();
  int64_t room = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int64_t begin = 0; begin < rows[r].numel;) {
      const auto next = static_cast<int64_t>(pieces.size());
      if (room <= 0) {
        chunks.push_back({next, next});
        room = elements;
      }
      const int64_t most = (room + kCutGranularity - 1) / kCutGranularity * kCutGranularity;
      const int64_t count = std::min(rows[r].numel - begin, most);
      pieces.push_back({static_cast<int32_t>(r), begin, count});
      chunks.back().last_piece = next + 1;
      begin += count;
      room -= count + kPieceOverhead;
    }
  }
}

}  // namespace fusedopt
