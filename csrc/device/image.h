// A table's image in device memory, as bytes: what a driver on the device reads, in one allocation.
// Torch-free and free of CUDA: the caller owns the memory and moves the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/prepare.h"
#include "device/table.h"

namespace fusedopt::device {

// Bytes of an image that are not yet on the device.
struct Range {
  size_t begin;
  size_t end;
};

// Where a table's scalars come from: slots that the host writes, or slots that a prepare kernel
// fills, one a row, from numbers on the device.
enum class Scalars { kHost, kDevice };

class Image {
 public:
  // Rows are taken over by `update`; their number, their sizes and the layouts are the table's for
  // good. `hypers` is the number of param groups.
  Image(const Table& table, Scalars scalars, size_t hypers, int multiprocessors);

  Scalars scalars() const { return scalars_; }
  const std::byte* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }
  int64_t chunks() const { return chunk_count_; }

  // Takes over what moved; appends to `changed` what has to be uploaded. `prepare` (one a row) and
  // `hypers` are read with scalars on the device only.
  void update(const Table& table, const std::vector<PrepareSlot>& prepare,
              const std::vector<DeviceHyper>& hypers, std::vector<Range>& changed);
  void update_hypers(const std::vector<DeviceHyper>& hypers, std::vector<Range>& changed);

  // The arguments of kernels, for an image that lies at `base` on the device.
  DeviceTable table_at(std::byte* base) const;
  PrepareTable prepare_at(std::byte* base) const;

 private:
  template <class T>
  T* part(size_t begin) {
    return reinterpret_cast<T*>(bytes_.data() + begin);
  }
  template <class T>
  void update_part(size_t begin, const std::vector<T>& from, std::vector<Range>& changed);

  Scalars scalars_;
  bool uploaded_ = false;
  int64_t row_count_;
  int64_t chunk_count_;
  size_t hypers_, slots_, rows_, prepare_, layouts_, chunks_;  // where each part begins
  std::vector<std::byte> bytes_;
};

}  // namespace fusedopt::device
