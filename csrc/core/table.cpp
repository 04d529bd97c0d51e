#include "core/table.h"

#include <algorithm>

namespace fusedopt {

namespace {

// What a piece costs whatever its length (table traffic, a call), counted in elements: a chunk of
// thousands of tiny rows closes before it has gathered its elements.
constexpr int64_t kPieceOverhead = 64;

// Rows are cut at multiples of this, so that no vector of any instruction tier straddles a cut.
constexpr int64_t kCutGranularity = 1024;

}  // namespace

int64_t Table::numel() const {
  int64_t total = 0;
  for (const Row& row : rows) total += row.numel;
  return total;
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
