// The stage of a step that writes: it launches, and counts.
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>

#include "cpu/driver.h"
#include "plan/plan.h"
#include "plan/pool.h"

namespace fusedopt {

namespace {

Verdict* verdict_at(const at::Tensor& memory) { return static_cast<Verdict*>(memory.data_ptr()); }

NormSums* sums_at(const at::Tensor& memory) { return static_cast<NormSums*>(memory.data_ptr()); }

}  // namespace

void StepPlan::check_capture(const Launch& launch) const {
  for (const HostRow& host : rows_) {
    if (&launches_[host.table] != &launch || !host.active) continue;
    if (host.has(kStep) && !host.step_on_device) {
      throw std::runtime_error(
          "step() cannot be captured in a CUDA graph: capturable=False, and the step counts are on "
          "the host; construct the optimizer with capturable=True");
    }
    if (purpose_ != Purpose::kUpdate) {
      throw std::runtime_error(
          "step() cannot be captured in a CUDA graph: gradients are being accumulated, and a "
          "replay "
          "cannot tell where in its window it is; capture forward and backward alone");
    }
    if (host.fresh) {
      throw std::runtime_error(
          "step() cannot be captured in a CUDA graph: this would be a parameter's first step, and "
          "every replay would start anew; take a step before capturing");
    }
  }
}

DeviceNumbers StepPlan::device_numbers(const Launch& launch, const AmpTensors& amp) const {
  DeviceNumbers numbers;
  for (const Group& group : groups_) {
    numbers.hypers.push_back(device_hyper(group.values, launch.device, numbers.kept));
  }
  numbers.scaler = device_scaler(amp, launch.device, numbers.kept);
  numbers.prepare.assign(launch.table.rows.size(), cuda::PrepareSlot{{}, 0, nullptr, 0, -1});
  for (const HostRow& host : rows_) {
    if (&launches_[host.table] != &launch || !host.active) continue;
    cuda::PrepareSlot& slot = numbers.prepare[host.row];
    slot.hyper = host.group;
    slot.host_step = host.step;
    slot.host_first = host.fresh ? 1 : 0;
    if (host.step_on_device) slot.step = {host.step_at, host.step_is_double ? 1 : 0};
    if (host.first.defined()) {
      slot.first = host.first.mutable_data_ptr<int32_t>();
      numbers.kept.push_back(host.first);
    }
  }
  return numbers;
}

// Readies every table on a device; returns which of them are being captured.
std::vector<bool> StepPlan::ready() {
  std::vector<bool> captures;
  for (const Launch& launch : launches_) {
    captures.push_back(launch.on_device != nullptr && launch.on_device->capturing());
    if (captures.back()) {
      check_capture(launch);
    } else if (launch.on_device != nullptr) {
      launch.on_device->ready(launch.table);
    }
  }
  return captures;
}

std::vector<Board> StepPlan::boards(const std::vector<DeviceNumbers>& numbers,
                                    const std::vector<bool>& captures) {
  std::vector<Board> boards(launches_.size());
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Launch& launch = launches_[i];
    if (launch.on_device == nullptr) continue;
    if (!captures[i]) {
      boards[i] = launch.on_device->upload(launch.table, numbers[i]);
      continue;
    }
    Table table = launch.table;  // with a slot a row, whatever the plan's own has
    std::vector<int> variants;
    for (const Group& group : groups_) variants.push_back(group.variant);
    for (size_t r = 0; r < table.rows.size(); ++r) table.rows[r].slot = static_cast<int32_t>(r);
    boards[i] = launch.on_device->capture(table, numbers[i], variants, *captured_);
  }
  return boards;
}

std::vector<Work> StepPlan::host_work(const Pass& pass) const {
  const Tier& tier = current_tier();
  std::vector<Work> work;
  for (const Launch& launch : launches_) {
    if (launch.on_device != nullptr) continue;
    const StorageTuple& storage = launch.table.storage;
    if (purpose_ == Purpose::kAccumulate) {
      const Kernel kernel = tier.accumulate(storage.grad, storage.param);
      work.push_back({&launch.table, kernel, Work::Kind::kAccumulate, pass});
    } else {
      const Kernel kernel = tier.kernel(rule_.index, launch.variant, storage_index(storage));
      work.push_back({&launch.table, kernel, Work::Kind::kUpdate, pass});
    }
  }
  return work;
}

void StepPlan::launch(const AmpTensors& amp) {
  const std::vector<bool> captures = ready();
  std::vector<DeviceNumbers> numbers(launches_.size());
  for (size_t i = 0; i < launches_.size(); ++i) {
    if (captures[i] || launches_[i].has_device_scalars()) {
      numbers[i] = device_numbers(launches_[i], amp);
    }
  }
  const std::vector<Board> on_devices = boards(numbers, captures);
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Launch& launch = launches_[i];
    if (launch.on_device != nullptr)
      launch.on_device->step(on_devices[i], launch.table, numbers[i]);
  }
  const std::vector<Work> work = host_work({});
  const py::gil_scoped_release no_gil;
  for_blocks(rows_.size(), [this](size_t begin, size_t end) { commit(begin, end); });
  if (!work.empty()) run_tables(work, run_on_torch_pool);
}

Question StepPlan::question_for(const Side& side, const AmpTensors& amp, const Micro& micro,
                                std::vector<at::Tensor>& kept) const {
  Question question;
  question.purpose = purpose_ == Purpose::kFlush ? Purpose::kClose : purpose_;
  question.check = onepass_->check ? 1 : 0;
  question.mean = onepass_->mean ? 1 : 0;
  question.max_norm = onepass_->max_norm;
  question.weight = micro.weight;
  question.grads = purpose_ == Purpose::kFlush ? 0 : 1;
  if (micro.live_weight.defined()) {
    kept.push_back(micro.live_weight.to(side.device, at::kDouble, /*non_blocking=*/true));
    question.live_weight = static_cast<const double*>(kept.back().const_data_ptr());
  }
  const cuda::Scaler scaler = device_scaler(amp, side.device, kept);
  question.grad_scale = scaler.grad_scale;
  question.found_inf = scaler.found_inf;
  return question;
}

// The CPU driver's norms, over all of its tables.
void StepPlan::run_norms(const Side& side, const Question& question) const {
  std::vector<Work> work = host_work({});
  for (Work& item : work) {
    item.kind = Work::Kind::kNorm;
    item.kernel = current_tier().norm(item.table->storage.grad, item.table->storage.param);
    item.sums = sums_at(side.blocks);
    item.in = weight_in(question);
  }
  const py::gil_scoped_release no_gil;
  run_tables(work, run_on_torch_pool);
}

// The norm's launches over a side's tables; `measure` is the last one's.
void StepPlan::launch_norms(const Side& side, const std::vector<Board>& boards,
                            const Question& question, cuda::Measure measure) {
  size_t last = 0;
  for (size_t i = 0; i < launches_.size(); ++i) {
    if (launches_[i].device == side.device) last = i;
  }
  for (size_t i = 0; i <= last; ++i) {
    const Launch& launch = launches_[i];
    if (launch.device != side.device) continue;
    cuda::Measure here = measure;
    if (i != last) here.last = here.decides = 0;
    launch.on_device->norm(boards[i], launch.table, {here, question});
  }
}

// Fills every side's verdict: from the norm of all rows, where it is asked for.
void StepPlan::measure(const std::vector<Board>& boards, const std::vector<Question>& questions,
                       const py::object& reduce) {
  const bool sums =
      purpose_ == Purpose::kAccumulate ? onepass_->check : onepass_->measures || onepass_->check;
  const bool apart = sides_.size() > 1 || sides_[0].specs.size() > 1 || sides_[0].specs[0];
  if (sums && apart) return measure_apart(boards, questions, reduce);
  for (size_t s = 0; s < sides_.size(); ++s) {
    const Side& side = sides_[s];
    Verdict* verdict = verdict_at(onepass_->verdict(side.device));
    if (side.launcher == nullptr) {
      NormSums total;
      if (sums) {
        run_norms(side, questions[s]);
        total = sum_blocks(sums_at(side.blocks), side.block_count());
      }
      decide(questions[s], total, *verdict);
    } else if (sums) {
      launch_norms(side, boards, questions[s],
                   {sums_at(side.blocks), side.block_count(), nullptr, verdict, 1, 1});
    } else {
      finish_norm(*side.launcher, side.device, launches_[0].table.storage,
                  {{nullptr, 0, nullptr, verdict, 1, 1}, questions[s]});
    }
  }
}

// The same where sums have to meet: those of several devices, and those of shards on several ranks.
void StepPlan::measure_apart(const std::vector<Board>& boards,
                             const std::vector<Question>& questions, const py::object& reduce) {
  std::vector<at::Tensor> totals;
  for (size_t s = 0; s < sides_.size(); ++s) {
    const Side& side = sides_[s];
    const auto segments = static_cast<int64_t>(side.specs.size());
    at::Tensor total = at::zeros({segments, 2}, at::TensorOptions(at::kDouble).device(side.device));
    NormSums* blocks = sums_at(side.blocks);
    if (side.launcher == nullptr) {
      run_norms(side, questions[s]);
    } else {
      launch_norms(side, boards, questions[s], {blocks, 0, nullptr, nullptr, 0, 0});
    }
    Verdict* verdict = verdict_at(onepass_->verdict(side.device));
    int64_t begin = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t count = side.ends[segment] - begin;
      if (side.launcher == nullptr) {
        sums_at(total)[segment] = sum_blocks(blocks + begin, count);
      } else {
        finish_norm(*side.launcher, side.device, launches_[0].table.storage,
                    {{blocks + begin, count, sums_at(total) + segment, verdict, 1, 0}, {}});
      }
      begin = side.ends[segment];
    }
    py::list specs;
    for (const py::object& spec : side.specs) specs.append(spec ? spec : py::none());
    reduce(specs, py::reinterpret_steal<py::object>(THPVariable_Wrap(total)));
    totals.push_back(std::move(total));
  }
  for (size_t s = 0; s < sides_.size(); ++s) {
    const Side& side = sides_[s];
    std::vector<at::Tensor> here;
    for (const at::Tensor& total : totals) here.push_back(total.to(side.device, true));
    const at::Tensor all = at::cat(here);
    Verdict* verdict = verdict_at(onepass_->verdict(side.device));
    if (side.launcher == nullptr) {
      decide(questions[s], sum_blocks(sums_at(all), all.size(0)), *verdict);
    } else {
      finish_norm(*side.launcher, side.device, launches_[0].table.storage,
                  {{sums_at(all), all.size(0), nullptr, verdict, 1, 1}, questions[s]});
    }
  }
}

bool StepPlan::launch(const AmpTensors& amp, const Micro& micro, const py::object& reduce) {
  if (rows_.empty()) {  // a micro-batch without gradients counts all the same
    if (purpose_ == Purpose::kAccumulate) onepass_->add_weight(micro.weight);
    return true;
  }
  const std::vector<bool> captures = ready();
  std::vector<at::Tensor> kept;
  std::vector<Question> questions;
  for (const Side& side : sides_) {
    questions.push_back(question_for(side, amp, micro, kept));
    kept.push_back(onepass_->verdict(side.device));
    kept.push_back(side.blocks);
  }
  const int64_t zero_grads = onepass_->zero_grads ? 1 : 0;
  std::vector<DeviceNumbers> numbers(launches_.size());
  for (size_t i = 0; i < launches_.size(); ++i) {
    const bool computes = captures[i] || launches_[i].has_device_scalars();
    if (computes && purpose_ != Purpose::kAccumulate) {
      numbers[i] = device_numbers(launches_[i], {});
      numbers[i].kept.insert(numbers[i].kept.end(), kept.begin(), kept.end());
    }
    numbers[i].pass = {verdict_at(onepass_->verdict(launches_[i].device)), zero_grads};
  }
  const std::vector<Board> on_devices = boards(numbers, captures);
  measure(on_devices, questions, reduce);

  const bool accumulates = purpose_ == Purpose::kAccumulate;
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Launch& launch = launches_[i];
    if (launch.on_device == nullptr) continue;
    if (accumulates) {
      launch.on_device->accumulate(on_devices[i], launch.table, numbers[i].pass);
    } else {
      launch.on_device->step(on_devices[i], launch.table, numbers[i]);
    }
  }
  bool took_place = true;
  const Verdict* on_host = nullptr;
  for (const Side& side : sides_) {
    if (side.launcher == nullptr) on_host = verdict_at(onepass_->verdict(side.device));
  }
  if (!accumulates && on_host != nullptr && on_host->skip != 0) {
    empty_window(zero_grads != 0);
    took_place = false;
  } else {
    const std::vector<Work> work = host_work({on_host, zero_grads});
    const py::gil_scoped_release no_gil;
    if (accumulates) {
      commit_accumulation();
    } else {
      for_blocks(rows_.size(), [this](size_t begin, size_t end) { commit(begin, end); });
    }
    if (!work.empty()) run_tables(work, run_on_torch_pool);
  }
  if (accumulates && zero_grads == 0) drop_grads();
  if (closes(purpose_)) {
    for (auto& [param, member] : onepass_->members()) member.taken = false;
  }
  return took_place;
}

// What is left of a step that the host skips: the window ends, gradients are cleared if asked to.
void StepPlan::empty_window(bool zero_grads) {
  for (HostRow& host : rows_) {
    if (launches_[host.table].on_device != nullptr) continue;
    const auto clear = [](c10::TensorImpl* tensor) {
      at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor)).zero_();
    };
    if (zero_grads && host.grad != nullptr) clear(host.grad);
    if (closes(purpose_) && host.member->taken) clear(host.states[kAccumulator]);
  }
}

// Gradients that are in the accumulators are freed.
void StepPlan::drop_grads() {
  for (HostRow& host : rows_) {
    if (host.grad == nullptr) continue;
    const Wrapping* wrapping = host.wrapping < 0 ? nullptr : &wrappings_[host.wrapping];
    (wrapping != nullptr ? wrapping->param : host.impl)->mutable_grad().reset();
    host.grad = nullptr;
  }
}

void StepPlan::commit_accumulation() {
  for (HostRow& host : rows_) {
    if (!host.active) continue;
    host.member->taken = true;
    const Wrapping* wrapping = host.wrapping < 0 ? nullptr : &wrappings_[host.wrapping];
    (wrapping != nullptr ? wrapping->states : host.states)[kAccumulator]->bump_version();
    if (!onepass_->zero_grads) continue;
    host.grad->bump_version();
    host.member->zeroed = host.grad;
    host.member->zeroed_version = host.grad->version_counter().current_version();
  }
}

void StepPlan::commit(size_t begin, size_t end) {
  // A version counter is bumped by a locked instruction, which waits for its cache miss and holds up
  // all that follow. Plain reads first: their misses overlap.
  for (size_t r = begin; r < end; ++r) {
    const HostRow& host = rows_[r];
    if (!host.active) continue;
    host.impl->version_counter().current_version();
    for (int k = 0; k < kRoles; ++k) {
      if (host.has(k)) host.states[k]->version_counter().current_version();
    }
  }
  const bool zeroes = onepass_ != nullptr && onepass_->zero_grads;
  for (size_t r = begin; r < end; ++r) {
    HostRow& host = rows_[r];
    if (!host.active) continue;
    host.fresh = false;
    if (host.member != nullptr) host.member->fresh = false;
    if (zeroes && host.grad != nullptr) host.grad->bump_version();
    // Of a DTensor torch bumps the outside alone: a view made by to_local() outlives a step.
    const Wrapping* wrapping = host.wrapping < 0 ? nullptr : &wrappings_[host.wrapping];
    (wrapping != nullptr ? wrapping->param : host.impl)->bump_version();
    for (int k = 0; k < kRoles; ++k) {
      if (!host.has(k)) continue;
      const bool wrapped = wrapping != nullptr && k != kStep;
      (wrapped ? wrapping->states[k] : host.states[k])->bump_version();
    }
    if (!host.has(kStep) || host.step_on_device) continue;
    if (host.step_is_double) {
      *static_cast<double*>(host.step_at) = host.step;
    } else {
      *static_cast<float*>(host.step_at) = static_cast<float>(host.step);
    }
  }
}

}  // namespace fusedopt
