// Tables that kernels on a device work on: their memory there, and what a step uploads and launches.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <vector>

#include "core/registry.h"
#include "device/graph_runtime.h"
#include "device/image.h"
#include "device/launcher.h"
#include "plan/hyper.h"
#include "plan/memory.h"

namespace fusedopt {

namespace py = pybind11;

// What GradScaler hands over; undefined without one.
struct AmpTensors {
  at::Tensor grad_scale;
  at::Tensor found_inf;
};

// What a step's scalars are computed from on the device, and the tensors it is read from.
struct DeviceNumbers {
  std::vector<device::PrepareSlot> prepare;  // one a row
  std::vector<device::DeviceHyper> hypers;   // one a param group
  Epilogue epilogue;
  std::vector<at::Tensor> kept;
};

// What a norm's launch over a table is told.
struct NormNumbers {
  device::Measure measure;
  DecisionInputs inputs;
};

// What of a group's hyperparameters decides which states its rows have.
struct GroupFlags {
  int variant = 0;
  bool keeps_scalar_states = false;
  bool operator==(const GroupFlags&) const = default;
};
GroupFlags group_flags(const RuleInfo& rule, const GroupValues& values);

// The tensor's numbers on another device, in stream order there. On the host, which reads them at once,
// they are there when this returns: a copy that does not wait goes to pinned memory, which torch fills later.
at::Tensor moved(const at::Tensor& tensor, c10::Device device, at::ScalarType dtype);

// A group's hyperparameters for kernels on `device`; what has to be moved there goes to `kept`.
device::DeviceHyper device_hyper(const GroupValues& values, c10::Device device,
                                 std::vector<at::Tensor>& kept);

// A tensor of AMP's as kernels on `device` read it, null if it is undefined; what has to be moved
// there goes to `kept`.
const float* amp_number(const at::Tensor& tensor, c10::Device device,
                        std::vector<at::Tensor>& kept);

// A norm's launch without a table: it sums up blocks that others wrote, and decides.
void finish_norm(device::Launcher& launcher, c10::Device device, StorageTuple storage,
                 const NormNumbers& norm);

// The stream that torch would launch on now.
device::Stream current_stream(c10::Device device);

// A table that was captured in a graph: an image of its own, in memory that no graph pool reuses,
// kept by the graph and everything made from it.
struct CapturedTable {
  CapturedTable(device::Launcher& launcher, c10::Device device, device::Image image);
  ~CapturedTable();
  CapturedTable(const CapturedTable&) = delete;
  CapturedTable& operator=(const CapturedTable&) = delete;

  device::Launcher& launcher;
  c10::Device device;
  device::Image image;
  std::byte* memory = nullptr;
  std::vector<GroupFlags> flags;  // of the groups, which replays cannot change
  // Numbers that the kernels read: since the capture, and since the last refresh.
  std::vector<at::Tensor> kept;
  std::vector<at::Tensor> refreshed;
};

// The captured tables of an optimizer, whatever becomes of the plans that made them.
class CapturedTables {
 public:
  void add(const std::shared_ptr<CapturedTable>& table) { tables_.push_back(table); }

  // Gives the hyperparameters of the groups to the graphs that are still there, in the order of the
  // current stream. Returns how many tables that were. Throws std::runtime_error, changing nothing,
  // if a flag changed the rule's formula or the number of groups is another.
  int refresh(const std::string& rule, const py::list& param_groups);

 private:
  std::vector<std::weak_ptr<CapturedTable>> tables_;
};

// A table's image, where it lies on the device, and the stream that a step launches on.
struct UploadedTable {
  const device::Image* image = nullptr;
  std::byte* memory = nullptr;
  device::Stream stream = nullptr;

  device::DeviceTable table() const { return image->table_at(memory); }
};

class TableOnDevice {
 public:
  // May take as long as compiling a kernel does.
  TableOnDevice(device::Launcher& launcher, c10::Device device, const RuleInfo& rule, int variant,
                StorageTuple storage, device::Scalars scalars, size_t groups);

  device::Launcher& launcher() const { return launcher_; }
  c10::Device device() const { return device_; }
  device::Scalars scalars() const { return scalars_; }
  int64_t chunks() const { return image_ == nullptr ? 0 : image_->chunks(); }
  bool capturing() const { return launcher_.capturing(current_stream(device_)); }

  // Makes the table's image and its memory, if there are none. Comes before the first table of a
  // plan is stepped: there may be no room for the last one's.
  void ready(const Table& table);

  // In the order of the current stream: uploads what moved since the last step.
  UploadedTable upload(const Table& table, const DeviceNumbers& numbers);

  // The same for a step that is being recorded in a graph, with an image of its own, which is given
  // to `captured`. `flags` are the groups'.
  UploadedTable capture(const Table& table, const DeviceNumbers& numbers,
                        const std::vector<GroupFlags>& flags, CapturedTables& captured);

  // A launch each, in the order of the current stream; a step is two where its scalars are computed
  // on the device.
  void norm(const UploadedTable& uploaded, const Table& table, const NormNumbers& norm);
  void accumulate(const UploadedTable& uploaded, const Table& table, const Epilogue& epilogue);
  void step(const UploadedTable& uploaded, const Table& table, const DeviceNumbers& numbers);

 private:
  device::Launcher& launcher_;
  c10::Device device_;
  const RuleInfo& rule_;
  int variant_;
  device::Scalars scalars_;
  size_t groups_;
  std::unique_ptr<device::Image> image_;
  at::Tensor memory_;
  device::Stream home_ = nullptr;  // that torch's allocator takes `memory_` to be used on
  device::UploadRing* ring_ =
      nullptr;  // null: its uploads go through torch's pinned allocator alone
  std::vector<device::Range> changed_;
};

}  // namespace fusedopt
