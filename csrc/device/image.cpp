#include "device/image.h"

#include <algorithm>
#include <cstring>

namespace fusedopt::device {

Image::Image(const Table& table, Scalars scalars, size_t hypers, int multiprocessors)
    : scalars_(scalars), row_count_(static_cast<int64_t>(table.rows.size())) {
  std::vector<DeviceChunk> chunks;
  cut(table, chunk_elements(table.numel(), multiprocessors, table.storage), chunks);
  chunk_count_ = static_cast<int64_t>(chunks.size());
  std::vector<DeviceLayout> layouts;
  for (const Layout& layout : table.layouts) layouts.push_back(device_layout(layout));

  size_t size = 0;
  const auto add = [&](size_t bytes) {
    constexpr size_t kAlignment = 256;  // of any struct, and of what a copy likes
    const size_t begin = size;
    size += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  const bool on_device = scalars == Scalars::kDevice;
  hypers_ = add(on_device ? hypers * sizeof(DeviceHyper) : 0);
  slots_ = add(table.rows.size() * table.slot_size);  // as many as there can be
  rows_ = add(table.rows.size() * sizeof(DeviceRow));
  prepare_ = add(on_device ? table.rows.size() * sizeof(PrepareSlot) : 0);
  layouts_ = add(layouts.size() * sizeof(DeviceLayout));
  chunks_ = add(chunks.size() * sizeof(DeviceChunk));
  bytes_.resize(size);
  std::copy(layouts.begin(), layouts.end(), part<DeviceLayout>(layouts_));
  std::copy(chunks.begin(), chunks.end(), part<DeviceChunk>(chunks_));
}

template <class T>
void Image::update_part(size_t begin, const std::vector<T>& from, std::vector<Range>& changed) {
  const size_t size = from.size() * sizeof(T);
  if (size == 0 || std::memcmp(bytes_.data() + begin, from.data(), size) == 0) return;
  std::memcpy(bytes_.data() + begin, from.data(), size);
  changed.push_back({begin, begin + size});
}

void Image::update_hypers(const std::vector<DeviceHyper>& hypers, std::vector<Range>& changed) {
  update_part(hypers_, hypers, changed);
}

void Image::update(const Table& table, const std::vector<PrepareSlot>& prepare,
                   const std::vector<DeviceHyper>& hypers, std::vector<Range>& changed) {
  if (scalars_ == Scalars::kDevice) {
    update_hypers(hypers, changed);
    update_part(prepare_, prepare, changed);
  } else {
    update_part(slots_, table.slots, changed);
  }
  // One range, from the first row that changed to the last.
  auto* rows = part<DeviceRow>(rows_);
  size_t first = table.rows.size();
  size_t last = 0;
  for (size_t r = 0; r < table.rows.size(); ++r) {
    if (!update_row(table.rows[r], table, rows[r])) continue;
    first = std::min(first, r);
    last = r + 1;
  }
  if (last > first) {
    changed.push_back({rows_ + first * sizeof(DeviceRow), rows_ + last * sizeof(DeviceRow)});
  }
  if (!uploaded_) changed = {{0, bytes_.size()}};
  uploaded_ = true;
}

DeviceTable Image::table_at(std::byte* base) const {
  return {reinterpret_cast<const DeviceRow*>(base + rows_),
          reinterpret_cast<const DeviceChunk*>(base + chunks_),
          reinterpret_cast<const DeviceLayout*>(base + layouts_), base + slots_, chunk_count_};
}

PrepareTable Image::prepare_at(std::byte* base) const {
  return {reinterpret_cast<const PrepareSlot*>(base + prepare_),
          reinterpret_cast<const DeviceHyper*>(base + hypers_), base + slots_, row_count_};
}

}  // namespace fusedopt::device
