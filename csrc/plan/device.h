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
  std::vector<cuda::PrepareSlot> prepare;  // one a row
  std::vector<cuda::DeviceHyper> hypers;   // one a param group
  cuda::Scaler scaler;
  Epilogue epilogue;
  std::vector<at::Tensor> kept;
};

// What a norm's launch over a table is told.
struct NormNumbers {
  cuda::Measure measure;
  DecisionInputs inputs;
};

// A group's hyperparameters for kernels on `device`; what has to be moved there goes to `kept`.
cuda::DeviceHyper device_hyper(const GroupValues& values, c10::Device device,
                               std::vector<at::Tensor>& kept);

// AMP's tensors as kernels on `device` read them; what has to be moved there goes to `kept`.
cuda::Scaler device_scaler(const AmpTensors& amp, c10::Device device,
                           std::vector<at::Tensor>& kept);

// A norm's launch without a table: it sums up blocks that others wrote, and decides.
void finish_norm(cuda::Launcher& launcher, c10::Device device, StorageTuple storage,
                 const NormNumbers& norm);

// The stream that torch would launch on now.
cuda::Stream current_stream(c10::Device device);

// A table that was captured in a graph: an image of its own, in memory that no graph pool reuses,
// kept by the graph and everything made from it.
struct CapturedTable {
  CapturedTable(cuda::Launcher& launcher, c10::Device device, cuda::Image image);
  ~CapturedTable();
  CapturedTable(const CapturedTable&) = delete;
  CapturedTable& operator=(const CapturedTable&) = delete;

  cuda::Launcher& launcher;
  c10::Device device;
  cuda::Image image;
  std::byte* memory = nullptr;
  std::vector<int> variants;  // of the groups, which replays cannot change
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
  const cuda::Image* image = nullptr;
  std::byte* memory = nullptr;
  cuda::Stream stream = nullptr;

  cuda::DeviceTable table() const { return image->table_at(memory); }
};

class TableOnDevice {
 public:
  // May take as long as compiling a kernel does.
  TableOnDevice(cuda::Launcher& launcher, c10::Device device, const RuleInfo& rule, int variant,
                StorageTuple storage, cuda::Scalars scalars, size_t groups);

  cuda::Launcher& launcher() const { return launcher_; }
  c10::Device device() const { return device_; }
  cuda::Scalars scalars() const { return scalars_; }
  int64_t chunks() const { return image_ == nullptr ? 0 : image_->chunks(); }
  bool capturing() const { return launcher_.capturing(current_stream(device_)); }

  // Makes the table's image and its memory, if there are none. Comes before the first table of a
  // plan is stepped: there may be no room for the last one's.
  void ready(const Table& table);

  // In the order of the current stream: uploads what moved since the last step.
  UploadedTable upload(const Table& table, const DeviceNumbers& numbers);

  // The same for a step that is being recorded in a graph, with an image of its own, which is given
  // to `captured`. `variants` are the groups'.
  UploadedTable capture(const Table& table, const DeviceNumbers& numbers,
                        const std::vector<int>& variants, CapturedTables& captured);

  // A launch each, in the order of the current stream; a step is two where its scalars are computed
  // on the device.
  void norm(const UploadedTable& uploaded, const Table& table, const NormNumbers& norm);
  void accumulate(const UploadedTable& uploaded, const Table& table, const Epilogue& epilogue);
  void step(const UploadedTable& uploaded, const Table& table, const DeviceNumbers& numbers);

 private:
  cuda::Launcher& launcher_;
  c10::Device device_;
  const RuleInfo& rule_;
  int variant_;
  cuda::Scalars scalars_;
  size_t groups_;
  std::unique_ptr<cuda::Image> image_;
  at::Tensor memory_;
  cuda::Stream home_ = nullptr;       // that torch's allocator takes `memory_` to be used on
  cuda::UploadRing* ring_ = nullptr;  // null: its uploads go through torch's pinned allocator alone
  std::vector<cuda::Range> changed_;
};

}  // namespace fusedopt
