#include "plan/device.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "plan/arguments.h"

namespace fusedopt {

namespace {

void check(device::Status status) {
  if (status != nullptr) throw std::runtime_error(std::string("the kernels' device: ") + status);
}

}  // namespace

at::Tensor moved(const at::Tensor& tensor, c10::Device device, at::ScalarType dtype) {
  return tensor.to(device, dtype, /*non_blocking=*/!device.is_cpu());
}

namespace {

// `tensor` as a number that kernels on `device` can read.
device::DeviceNumber device_number(const at::Tensor& tensor, c10::Device device,
                                   std::vector<at::Tensor>& kept) {
  at::Tensor here = tensor;
  if (here.device() != device || (here.dtype() != at::kFloat && here.dtype() != at::kDouble)) {
    here = moved(tensor, device, at::kDouble);
  }
  kept.push_back(here);
  return device::number_at(const_cast<void*>(here.const_data_ptr()), here.dtype() == at::kDouble);
}

// The ring that small uploads to a device pass through; null where there is none.
device::UploadRing* ring_of(c10::Device device) {
  constexpr size_t kPlaceBytes = 64 << 10;
  constexpr size_t kPlaces = 32;  // steps that may be launched before the first of them has begun
  if (!device.is_cuda()) return nullptr;
  // Never destroyed: copies may be under way until the process ends.
  static auto* pinned = new std::vector<at::Tensor>();
  static auto* rings = new std::vector<std::unique_ptr<device::UploadRing>>();
  const auto index = static_cast<size_t>(device.index());
  if (index >= rings->size()) rings->resize(index + 1);
  if ((*rings)[index] == nullptr) {
    pinned->push_back(
        at::empty({kPlaceBytes * kPlaces}, at::TensorOptions(at::kByte).pinned_memory(true)));
    auto* memory = static_cast<std::byte*>(pinned->back().data_ptr());
    (*rings)[index] = std::make_unique<device::UploadRing>(memory, kPlaceBytes, kPlaces);
  }
  return (*rings)[index].get();
}

// Copies parts of an image to where it lies on the device, in the order of the current stream: small
// ones through the ring, if there is one. Otherwise the staging memory comes from torch's pinned
// allocator, which hands it out again once it was copied.
void upload_ranges(const device::Image& image, const std::vector<device::Range>& ranges,
                   const at::Tensor& memory, device::UploadRing* ring, device::Stream stream) {
  auto* to = static_cast<std::byte*>(memory.data_ptr());
  device::Status status = nullptr;
  if (ring != nullptr && ring->send(to, image.data(), ranges, stream, status)) return check(status);
  for (const device::Range& range : ranges) {
    const size_t bytes = range.end - range.begin;
    if (memory.is_cpu()) {
      std::memcpy(to + range.begin, image.data() + range.begin, bytes);
      continue;
    }
    const auto size = static_cast<int64_t>(bytes);
    const at::Tensor staging = at::empty({size}, at::TensorOptions(at::kByte).pinned_memory(true));
    std::memcpy(staging.data_ptr(), image.data() + range.begin, bytes);
    memory.narrow(0, static_cast<int64_t>(range.begin), size).copy_(staging, /*non_blocking=*/true);
  }
}

// Captured tables whose graphs are gone. The last reference is dropped on a thread of CUDA's that
// must not free device memory, so it waits here for the next step.
class Leftovers {
 public:
  static void release(void* table) {
    const std::lock_guard<std::mutex> lock(mutex());
    tables().emplace_back(static_cast<std::shared_ptr<CapturedTable>*>(table));
  }
  static void free() {
    std::vector<std::unique_ptr<std::shared_ptr<CapturedTable>>> left;
    const std::lock_guard<std::mutex> lock(mutex());
    left.swap(tables());
  }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  // Never destroyed: a graph may outlive the end of this library.
  static std::vector<std::unique_ptr<std::shared_ptr<CapturedTable>>>& tables() {
    static auto* tables = new std::vector<std::unique_ptr<std::shared_ptr<CapturedTable>>>();
    return *tables;
  }
};

}  // namespace

GroupFlags group_flags(const RuleInfo& rule, const GroupValues& values) {
  return {rule.variant(values.hyper), rule.keeps_scalar_states(values.hyper)};
}

device::DeviceHyper device_hyper(const GroupValues& values, c10::Device device,
                                 std::vector<at::Tensor>& kept) {
  device::DeviceHyper hyper{};
  for (int k = 0; k < kMaxHyper; ++k) {
    hyper.values[k] = values.live[k].defined() ? device_number(values.live[k], device, kept)
                                               : device::number_of(values.hyper.values[k]);
  }
  hyper.grad_factor = values.maximize ? -1.0 : 1.0;
  return hyper;
}

const float* amp_number(const at::Tensor& tensor, c10::Device device,
                        std::vector<at::Tensor>& kept) {
  if (!tensor.defined()) return nullptr;
  kept.push_back(moved(tensor, device, at::kFloat));
  return static_cast<const float*>(kept.back().const_data_ptr());
}

device::Stream current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  // c10's own way to a stream's handle is younger than the oldest torch supported.
  static const auto module = new py::module_(py::module_::import("torch._C"));
  const char* name = device.is_xpu() ? "_xpu_getCurrentRawStream" : "_cuda_getCurrentRawStream";
  return reinterpret_cast<device::Stream>(
      module->attr(name)(int(device.index())).cast<uintptr_t>());
}

CapturedTable::CapturedTable(device::Launcher& launcher, c10::Device device, device::Image image)
    : launcher(launcher), device(device), image(std::move(image)) {
  void* at = nullptr;
  check(launcher.place(&at, this->image.data(), this->image.size()));
  memory = static_cast<std::byte*>(at);
}

CapturedTable::~CapturedTable() {
  const c10::DeviceGuard guard(device);
  launcher.drop(memory);
}

int CapturedTables::refresh(const std::string& rule_name, const py::list& param_groups) {
  Leftovers::free();
  std::vector<std::shared_ptr<CapturedTable>> alive;
  for (const std::weak_ptr<CapturedTable>& table : tables_) {
    if (auto held = table.lock()) alive.push_back(std::move(held));
  }
  tables_.assign(alive.begin(), alive.end());
  const RuleInfo& rule = find_rule(rule_name);
  const GroupReader reader(rule);
  for (const auto& table : alive) {
    if (table->flags.size() > param_groups.size()) {
      throw std::runtime_error("param_groups: a captured group is gone; capture the step again");
    }
  }
  struct Fresh {
    std::vector<device::DeviceHyper> hypers;
    std::vector<at::Tensor> kept;
  };
  std::vector<Fresh> fresh;
  for (const auto& table : alive) {  // all of them, before the first is changed
    auto& [hypers, kept] = fresh.emplace_back();
    const auto live = table->device.is_cpu() ? LiveTensors::kAll : LiveTensors::kOffHost;
    for (size_t g = 0; g < table->flags.size(); ++g) {
      const GroupValues values = reader.read(dict_of(param_groups[g], "a param group"), live);
      if (group_flags(rule, values) != table->flags[g]) {
        throw std::runtime_error(
            "param_groups: a flag that changes the formula was set after the step was captured; "
            "a replay cannot follow, capture the step again");
      }
      hypers.push_back(device_hyper(values, table->device, kept));
    }
  }
  for (size_t t = 0; t < alive.size(); ++t) {
    CapturedTable& table = *alive[t];
    const c10::DeviceGuard guard(table.device);
    std::vector<device::Range> changed;
    table.image.update_hypers(fresh[t].hypers, changed);
    const auto size = static_cast<int64_t>(table.image.size());
    upload_ranges(
        table.image, changed,
        at::from_blob(table.memory, {size}, at::TensorOptions(at::kByte).device(table.device)),
        ring_of(table.device), current_stream(table.device));
    table.refreshed = std::move(fresh[t].kept);  // what it held before is read no more
  }
  return static_cast<int>(alive.size());
}

TableOnDevice::TableOnDevice(device::Launcher& launcher, c10::Device device, const RuleInfo& rule,
                             int variant, StorageTuple storage, device::Scalars scalars,
                             size_t groups)
    : launcher_(launcher),
      device_(device),
      rule_(rule),
      variant_(variant),
      scalars_(scalars),
      groups_(groups) {
  const c10::DeviceGuard guard(device_);
  check(launcher_.load(storage, rule_.index, variant_));
}

void TableOnDevice::ready(const Table& table) {
  if (image_ != nullptr) return;
  const c10::DeviceGuard guard(device_);
  auto image =
      std::make_unique<device::Image>(table, scalars_, groups_, launcher_.multiprocessors());
  memory_ = at::empty({static_cast<int64_t>(image->size())},
                      at::TensorOptions(at::kByte).device(device_));
  home_ = current_stream(device_);
  ring_ = ring_of(device_);
  image_ = std::move(image);
}

UploadedTable TableOnDevice::upload(const Table& table, const DeviceNumbers& numbers) {
  Leftovers::free();
  const c10::DeviceGuard guard(device_);
  const device::Stream stream = current_stream(device_);
  changed_.clear();
  image_->update(table, numbers.prepare, numbers.hypers, changed_);
  upload_ranges(*image_, changed_, memory_, ring_, stream);
  if (stream != home_) {
    memory_.record_stream(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }
  return {image_.get(), static_cast<std::byte*>(memory_.data_ptr()), stream};
}

UploadedTable TableOnDevice::capture(const Table& table, const DeviceNumbers& numbers,
                                     const std::vector<GroupFlags>& flags,
                                     CapturedTables& captured) {
  const c10::DeviceGuard guard(device_);
  const device::Stream stream = current_stream(device_);
  device::Image image(table, device::Scalars::kDevice, groups_, launcher_.multiprocessors());
  std::vector<device::Range> changed;
  image.update(table, numbers.prepare, numbers.hypers, changed);
  auto made = std::make_shared<CapturedTable>(launcher_, device_, std::move(image));
  made->flags = flags;
  made->kept = numbers.kept;
  auto held = std::make_unique<std::shared_ptr<CapturedTable>>(made);
  check(launcher_.keep(stream, held.get(), Leftovers::release));
  static_cast<void>(held.release());  // the graph's now
  captured.add(made);
  return {&made->image, made->memory, stream};
}

void TableOnDevice::norm(const UploadedTable& uploaded, const Table& table,
                         const NormNumbers& norm) {
  const c10::DeviceGuard guard(device_);
  check(
      launcher_.norm(table.storage, uploaded.table(), norm.measure, norm.inputs, uploaded.stream));
}

void TableOnDevice::accumulate(const UploadedTable& uploaded, const Table& table,
                               const Epilogue& epilogue) {
  if (uploaded.image->chunks() == 0) return;
  const c10::DeviceGuard guard(device_);
  check(launcher_.accumulate(table.storage, uploaded.table(), epilogue, uploaded.stream));
}

void TableOnDevice::step(const UploadedTable& uploaded, const Table& table,
                         const DeviceNumbers& numbers) {
  const c10::DeviceGuard guard(device_);
  if (uploaded.image->scalars() == device::Scalars::kDevice) {
    check(launcher_.prepare(rule_.index, table.storage.param == DType::kF64,
                            uploaded.image->prepare_at(uploaded.memory), numbers.epilogue.decision,
                            uploaded.stream));
  }
  if (uploaded.image->chunks() == 0)
    return;  // parameters without elements, whose steps are counted
  check(launcher_.update(table.storage, rule_.index, variant_, uploaded.table(), numbers.epilogue,
                         uploaded.stream));
}

void finish_norm(device::Launcher& launcher, c10::Device device, StorageTuple storage,
                 const NormNumbers& norm) {
  const c10::DeviceGuard guard(device);
  check(launcher.norm(storage, device::DeviceTable{}, norm.measure, norm.inputs,
                      current_stream(device)));
}

}  // namespace fusedopt
