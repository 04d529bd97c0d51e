// What happens around updates: norms of every tier and of the CUDA bodies against sums of their own
// in the order that core/decision.h states, accumulation, and what `decide` makes of the sums.
#include <cmath>
#include <limits>
#include <thread>

#include "bodies.h"
#include "check.h"
#include "core/decision.h"
#include "cpu/driver.h"
#include "job.h"

namespace {

using namespace fusedopt;
using namespace fusedopt::testing;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void three_threads(const std::function<void()>& worker) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(worker);
  for (std::thread& thread : threads) thread.join();
}

bool same(double a, double b) { return a == b || (a != a && b != b); }

// Rows of every kind: with a gradient, an accumulator, both, or neither; strided ones.
Job make_rows(const StorageTuple& storage, const StepDecision* decision) {
  const RuleInfo& rule = find_rule("sgd");
  Job job(rule, all_variants(rule).front(), storage);
  job.surround({decision, 0});
  for (const int64_t n : {1, 0, 255, 256, 1023, 1024, 1025, 2048, 5000, 3}) {
    job.add_row(n, n, n != 2048, -1);
  }
  job.table.layouts.push_back(make_layout({3, 7, 120}, kMaxArrays));
  job.add_row(2520, extent_of(job.table.layouts[0], kMaxArrays), true, 0);
  int64_t blocks = 0;
  for (size_t r = 0; r < job.arrays.size(); ++r) {
    for (const int a : {1, 2 + kAccumulator}) {  // finite, and of every magnitude
      Array& array = job.arrays[r][a];
      const auto extent = static_cast<int64_t>(array.bytes.size()) / item_size(array.dtype);
      for (int64_t i = 0; i < extent - array.offset; ++i) {
        if (!std::isfinite(array.get(i))) array.set(i, 1.0);
      }
      job.expected[r][a] = array;
    }
    job.table.rows[r].norm_block = blocks;
    blocks += norm_blocks(job.table.rows[r].numel);
  }
  job.table.cut(2048);
  return job;
}

int64_t blocks_of(const Job& job) {
  const Row& last = job.table.rows.back();
  return last.norm_block + norm_blocks(last.numel);
}

// In the stated order, an element at a time.
template <class T>
std::vector<NormSums> expected_sums(const Job& job, double in) {
  std::vector<NormSums> sums(blocks_of(job));
  for (size_t r = 0; r < job.arrays.size(); ++r) {
    const Row& row = job.table.rows[r];
    const bool has_grad = job.has(r, 1);
    const bool has_sum = job.has(r, 2 + kAccumulator);
    for (int64_t begin = 0; begin < row.numel; begin += kNormBlock) {
      double with[kNormClasses] = {};
      double without[kNormClasses] = {};
      for (int64_t i = begin; i < std::min(row.numel, begin + kNormBlock); ++i) {
        const T g = has_grad ? T(job.arrays[r][1].get(job.element(row, 1, i))) : T(0);
        T seen = g;
        if (has_sum) {
          constexpr int kPlace = 2 + kAccumulator;
          const T a = T(job.arrays[r][kPlace].get(job.element(row, kPlace, i)));
          without[(i - begin) % kNormClasses] += double(a) * double(a);
          seen = has_grad ? a + g * T(in) : a;
        }
        if (has_grad || has_sum) with[(i - begin) % kNormClasses] += double(seen) * double(seen);
      }
      for (double* classes : {with, without}) {
        for (int count = kNormClasses / 2; count > 0; count /= 2) {
          for (int i = 0; i < count; ++i) classes[i] = classes[i] + classes[i + count];
        }
      }
      sums[row.norm_block + begin / kNormBlock] = {with[0], without[0]};
    }
  }
  return sums;
}

void compare(const std::vector<NormSums>& got, const std::vector<NormSums>& wanted,
             const std::string& what) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    ++checked;
    CHECK(same(got[i].with, wanted[i].with) && same(got[i].without, wanted[i].without),
          what + ": block " + std::to_string(i) + " is " + std::to_string(got[i].with) +
              ", wanted " + std::to_string(wanted[i].with));
  }
}

void test_norms() {
  constexpr double kIn = 0.375;
  for (const StorageTuple& storage : kStorageTuples) {
    Job job = make_rows(storage, nullptr);
    job.connect();
    const bool in_double = storage.param == DType::kF64;
    const std::vector<NormSums> wanted =
        in_double ? expected_sums<double>(job, kIn) : expected_sums<float>(job, kIn);
    const std::vector<NormSums> stale(wanted.size(), {7.0, 7.0});
    for (const Tier& tier : built_tiers()) {
      if (!tier.supported()) continue;
      for (const int64_t elements : {1024, 4096, 1 << 20}) {
        job.table.cut(elements);
        std::vector<NormSums> sums = stale;
        run_tables({{&job.table,
                     tier.norm(storage.grad, storage.param),
                     Work::Kind::kNorm,
                     {},
                     sums.data(),
                     kIn}},
                   three_threads);
        compare(sums, wanted, "norm: " + job.name(tier.name));
      }
    }
    std::vector<device::DeviceRow> rows(job.table.rows.size());
    for (size_t r = 0; r < rows.size(); ++r)
      device::update_row(job.table.rows[r], job.table, rows[r]);
    const device::DeviceLayout layout = device::device_layout(job.table.layouts[0]);
    DecisionInputs inputs;
    inputs.weight = kIn;
    for (const int64_t elements : {1024, 8192}) {
      std::vector<device::DeviceChunk> chunks;
      device::cut(job.table, elements, chunks);
      const device::DeviceTable table{rows.data(), chunks.data(), &layout, nullptr,
                                      static_cast<int64_t>(chunks.size())};
      std::vector<NormSums> sums = stale;
      const device::Measure measure{sums.data(), 0, nullptr, nullptr, 0, 0};
      for (int64_t c = 0; c < table.chunk_count; ++c) {
        norm_of(storage.grad, storage.param)(table, inputs, measure, c);
      }
      compare(sums, wanted, "norm: " + job.name("a CUDA body"));
    }
  }
}

template <class T>
void expect_accumulation(Job& job, bool zero) {
  const StepDecision& decision = *job.epilogue.decision;
  for (size_t r = 0; r < job.arrays.size(); ++r) {
    const Row& row = job.table.rows[r];
    constexpr int kPlace = 2 + kAccumulator;
    for (int64_t i = 0; job.has(r, 1) && job.has(r, kPlace) && i < row.numel; ++i) {
      Array& sum = job.expected[r][kPlace];
      Array& grad = job.expected[r][1];
      const int64_t at = job.element(row, kPlace, i);
      const T g = T(grad.get(job.element(row, 1, i)));
      if (decision.take != 0) sum.set(at, T(sum.get(at)) + g * decision.in<T>());
      if (zero) grad.set(job.element(row, 1, i), 0.0);
    }
  }
}

void test_accumulation() {
  for (const StorageTuple& storage : kStorageTuples) {
    for (const bool take : {true, false}) {
      const StepDecision decision = some_verdict(take);
      for (const bool zero : {true, false}) {
        Job job = make_rows(storage, &decision);
        // Rows that have a gradient have an accumulator, in an accumulation.
        Job run = job;
        run.connect();
        for (size_t r = 0; r < run.arrays.size(); ++r) {
          if (run.table.rows[r].state[kAccumulator] == nullptr) run.table.rows[r].grad = nullptr;
        }
        if (storage.param == DType::kF64) {
          expect_accumulation<double>(run, zero);
        } else {
          expect_accumulation<float>(run, zero);
        }
        const Epilogue epilogue{&decision, zero ? 1 : 0};
        for (const Tier& tier : built_tiers()) {
          if (!tier.supported()) continue;
          Job here = run;
          here.connect();
          for (size_t r = 0; r < here.arrays.size(); ++r) {
            here.table.rows[r].grad =
                run.table.rows[r].grad == nullptr ? nullptr : here.arrays[r][1].at(0);
          }
          run_tables({{&here.table, tier.accumulate(storage.grad, storage.param),
                       Work::Kind::kAccumulate, epilogue}},
                     three_threads);
          here.compare(job, "accumulation: " + job.name(tier.name), /*moves=*/false);
        }
        Job here = run;
        here.connect();
        std::vector<device::DeviceRow> rows(here.table.rows.size());
        for (size_t r = 0; r < rows.size(); ++r) {
          if (run.table.rows[r].grad == nullptr) here.table.rows[r].grad = nullptr;
          device::update_row(here.table.rows[r], here.table, rows[r]);
        }
        const device::DeviceLayout layout = device::device_layout(here.table.layouts[0]);
        std::vector<device::DeviceChunk> chunks;
        device::cut(here.table, 1024, chunks);
        const device::DeviceTable table{rows.data(), chunks.data(), &layout, nullptr,
                                        static_cast<int64_t>(chunks.size())};
        for (int64_t c = 0; c < table.chunk_count; ++c) {
          for (int thread = 0; thread < 5; ++thread) {
            accumulate_of(storage.grad, storage.param)(table, epilogue, c, thread, 5);
          }
        }
        here.compare(job, "accumulation: " + job.name("a CUDA body"), /*moves=*/false);
      }
    }
  }
}

StepDecision decided(const DecisionInputs& inputs, const NormSums& sums, double weight = 0.0) {
  StepDecision decision;
  decision.weight = weight;
  decide(inputs, sums, decision);
  ++checked;
  return decision;
}

void test_decisions() {
  DecisionInputs clip;
  clip.max_norm = 2.0;
  CHECK(decided(clip, {16.0, 0.0}).factor64 == 2.0 / (4.0 + 1e-6), "clipped");
  CHECK(decided(clip, {1.0, 0.0}).factor64 == 1.0, "not clipped");
  CHECK(decided(clip, {16.0, 0.0}).norm == 4.0, "the norm is the one before");
  CHECK(std::isnan(decided(clip, {NAN, 0.0}).factor64), "NaN is clip_grad_norm_'s, too");
  CHECK(decided(clip, {kInfinity, 0.0}).skip == 0, "nobody asked for a check");
  clip.check = 1;
  for (const double bad : {kInfinity, double(NAN)}) {
    CHECK(decided(clip, {bad, 0.0}).skip == 1, "a sum that is not finite skips");
  }
  const float scale = 8.0f;
  clip.grad_scale = &scale;
  CHECK(decided(clip, {1024.0, 0.0}).norm == 4.0, "the norm of what is unscaled");
  CHECK(decided(clip, {1024.0, 0.0}).factor64 == 0.125 * (2.0 / (4.0 + 1e-6)), "unscaled, clipped");
  float found = 0.0f;
  DecisionInputs scaled;
  scaled.found_inf = &found;
  CHECK(decided(scaled, {}).skip == 0, "nothing was found");
  found = 1.0f;
  CHECK(decided(scaled, {}).skip == 1, "somebody found one");

  DecisionInputs add;
  add.purpose = Purpose::kAccumulate;
  add.weight = 3.0;
  add.grad_scale = &scale;
  StepDecision after = decided(add, {}, 2.0);
  CHECK(after.weight == 5.0 && after.in64 == 0.375 && after.take == 1, "a micro-batch of weight 3");
  add.check = 1;
  after = decided(add, {kInfinity, 0.0}, 2.0);
  CHECK(after.weight == 2.0 && after.take == 0, "one that is not finite does not count");
  const double live = 4.0;
  add.live_weight = &live;
  CHECK(decided(add, {}, 2.0).weight == 6.0, "a weight on the device");

  DecisionInputs close;
  close.purpose = Purpose::kClose;
  close.check = 1;
  after = decided(close, {100.0, 36.0}, 4.0);
  CHECK(after.factor64 == 1.0 / 5.0 && after.norm == 10.0 * (1.0 / 5.0), "the mean of five");
  CHECK(after.skip == 0 && after.take == 1 && after.weight == 0.0, "the window is empty");
  after = decided(close, {NAN, 36.0}, 4.0);
  CHECK(after.factor64 == 1.0 / 4.0 && after.norm == 6.0 * (1.0 / 4.0) && after.take == 0,
        "the last one is left out");
  CHECK(decided(close, {NAN, 0.0}, 0.0).skip == 1, "nothing is left");
  CHECK(decided(close, {NAN, kInfinity}, 4.0).skip == 1, "accumulators that have overflowed");
  close.grads = 0;
  CHECK(decided(close, {36.0, 36.0}, 4.0).factor64 == 1.0 / 4.0, "accumulators alone");
  CHECK(decided(close, {0.0, 0.0}, 0.0).skip == 1, "a window of no weight");
  close.mean = 0;
  CHECK(decided(close, {36.0, 36.0}, 4.0).factor64 == 1.0, "the sum");
}

}  // namespace

int main() {
  test_decisions();
  test_norms();
  test_accumulation();
  return check::finish("epilogue_test", checked);
}
