#include "device/table.h"

#include <algorithm>

namespace fusedopt::device {

namespace {

// Whether all accesses of a row's width are aligned once its head has been passed.
bool aligned(const DeviceRow& row, const Table& table) {
  const auto fits = [&](const void* array, int index) {
    if (!table.has(index)) return true;
    const int item = item_size(table.dtype(index));
    const int bytes = std::min(row.width * item, kAccessBytes);
    return (reinterpret_cast<uintptr_t>(array) + row.head * item) % bytes == 0;
  };
  // An array that a row lacks in this step does not narrow the others.
  bool all = fits(row.param, 0) && (row.grad == nullptr || fits(row.grad, 1));
  for (int k = 0; k < kMaxRowStates; ++k) {
    all = all && (row.state[k] == nullptr || fits(row.state[k], 2 + k));
  }
  return all;
}

}  // namespace

bool update_row(const Row& from, const Table& table, DeviceRow& row) {
  const bool moved = row.param != from.param || row.grad != from.grad || row.width == 0 ||
                     !std::equal(from.state, from.state + kMaxRowStates, row.state);
  if (!moved && row.slot == from.slot && row.norm_block == from.norm_block) return false;
  row.slot = from.slot;
  row.norm_block = from.norm_block;
  if (!moved) return true;
  row.param = from.param;
  row.grad = from.grad;
  row.layout = from.layout;
  std::copy(from.state, from.state + kMaxRowStates, row.state);
  for (row.width = vector_width(table.storage); row.width > 1; row.width /= 2) {
    for (row.head = 0; row.head < row.width; ++row.head) {
      if (aligned(row, table)) return true;
    }
  }
  row.head = 0;
  return true;
}

DeviceLayout device_layout(const Layout& layout) {
  DeviceLayout made{};
  made.dims = static_cast<int32_t>(layout.sizes.size());
  std::copy(layout.sizes.begin(), layout.sizes.end(), made.sizes);
  for (int a = 0; a < kMaxArrays; ++a) {
    std::copy(layout.strides[a].begin(), layout.strides[a].end(), made.strides[a]);
  }
  return made;
}

void cut(const Table& table, int64_t elements, std::vector<DeviceChunk>& chunks) {
  chunks.clear();
  for (size_t r = 0; r < table.rows.size(); ++r) {
    for (int64_t begin = 0; begin < table.rows[r].numel; begin += elements) {
      const int64_t count = std::min(elements, table.rows[r].numel - begin);
      chunks.push_back({begin, static_cast<int32_t>(count), static_cast<int32_t>(r)});
    }
  }
}

int64_t chunk_elements(int64_t numel, int multiprocessors, const StorageTuple& storage) {
  const int64_t least = std::max(int64_t{kThreads} * vector_width(storage), kNormBlock);
  constexpr int64_t kMost = 32 * 1024;
  // Blocks take chunks in turn: with few each, the last turn would leave most of the chip idle.
  constexpr int kChunksEach = 32;
  const int64_t wanted = numel / (int64_t{multiprocessors} * kChunksEach);
  return std::clamp(wanted / least * least, least, kMost / least * least);
}

}  // namespace fusedopt::device
