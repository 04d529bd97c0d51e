// The CPU driver against the scalar path: rules called one element at a time with the conversions
// of core/dtype.h. Every instruction tier the machine has must give the same bits, for every rule,
// variant and storage tuple, whatever the length, alignment, layout, chunk size or thread count.
#include "cpu/driver.h"

#include <stdexcept>
#include <thread>

#include "bits16.h"
#include "check.h"
#include "job.h"

namespace {

using namespace fusedopt;
using namespace fusedopt::testing;

Work work_of(const Job& job, const Table& table, const Tier& tier) {
  return {&table, tier.kernel(job.rule->index, job.variant(), storage_index(job.storage)),
          Work::Kind::kUpdate, job.epilogue};
}

void check(const Job& job, const Tier& tier, const RunWorkers& workers, const std::string& what) {
  job.check(what + ": " + job.name(tier.name),
            [&](const Table& table) { run_tables({work_of(job, table, tier)}, workers); });
}

void one_thread(const std::function<void()>& worker) { worker(); }
void three_threads(const std::function<void()>& worker) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(worker);
  for (std::thread& thread : threads) thread.join();
}

std::vector<Tier> tiers_here() {
  std::vector<Tier> tiers;
  for (const Tier& tier : built_tiers()) {
    if (tier.supported()) tiers.push_back(tier);
  }
  return tiers;
}

// ---- Tests -----------------------------------------------------------------------------------

// Sizes 0 .. 4 vectors + 1 of the widest tier in one table; every seventh row takes no part.
void test_sizes() {
  for_each_variant([](Job job) {
    for (int64_t n = 0; n <= 4 * 16 + 1; ++n) job.add_row(n, n, n % 7 != 3, -1);
    job.table.cut(kCpuChunkElements);
    job.expect();
    for (const Tier& tier : tiers_here()) check(job, tier, one_thread, "sizes");
  });
}

void test_layouts() {
  const std::vector<std::vector<int64_t>> shapes = {{1},       {7},      {5, 3},
                                                    {2, 1, 9}, {7, 300}, {3, 5, 2, 70}};
  for_each_variant([&](Job job) {
    const int arrays = 2 + job.states.count;
    for (const std::vector<int64_t>& sizes : shapes) {
      for (const bool expanded : {false, true}) {
        Layout layout = make_layout(sizes, arrays);
        if (expanded) layout.strides[1].assign(sizes.size(), 0);
        int64_t numel = 1;
        for (const int64_t size : sizes) numel *= size;
        const auto index = static_cast<int32_t>(job.table.layouts.size());
        job.table.layouts.push_back(layout);
        job.add_row(numel, extent_of(layout, arrays), true, index);
      }
    }
    // An expanded gradient that happens to be NaN or 0 would hide its row.
    for (size_t r = 1; r < job.arrays.size(); r += 2) {
      job.arrays[r][1].set(0, 0.75);
      job.expected[r][1].set(0, 0.75);
    }
    job.table.cut(1024);  // pieces begin inside a layout
    job.expect();
    for (const Tier& tier : tiers_here()) check(job, tier, three_threads, "layouts");
  });
}

// Accumulators, averages, a factor, gradients that are left out or cleared, for rows that have all of
// these or some.
void test_surroundings() {
  for (const bool take : {true, false}) {
    const StepDecision decision = some_verdict(take);
    for_each_variant([&](Job job) {
      job.surround({&decision, take ? 0 : 1, take ? 1 : 0});
      for (const int64_t n : {1, 0, 15, 16, 17, 33, 64, 65, 700}) job.add_row(n, n, n != 33, -1);
      for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{7, 30}, {3, 5, 2, 70}}) {
        int64_t numel = 1;
        for (const int64_t size : sizes) numel *= size;
        job.table.layouts.push_back(make_layout(sizes, kMaxArrays));
        job.add_row(numel, extent_of(job.table.layouts.back(), kMaxArrays), true,
                    static_cast<int32_t>(job.table.layouts.size()) - 1);
      }
      job.table.cut(1024);
      job.expect();
      for (const Tier& tier : tiers_here()) check(job, tier, three_threads, "surroundings");
    });
  }
}

// Cutting must not change a bit: rows longer than chunks, chunks of many rows, every thread count.
void test_chunks() {
  const RuleInfo& rule = find_rule("adamw");
  for (const HyperValues& hyper : all_variants(rule)) {
    Job job(rule, hyper, {DType::kBF16, DType::kBF16, DType::kF32});
    for (const int64_t n : {1, 1023, 0, 1024, 1025, 5000, 0, 3, 2048, 4097, 0}) {
      job.add_row(n, n, true, -1);
    }
    job.expect();
    for (const int64_t elements : {1, 1000, 1024, 1025, 4096, 1 << 20}) {
      job.table.cut(elements);
      const std::string what = "chunks of " + std::to_string(elements);
      int64_t piece = 0;
      for (const Chunk& chunk : job.table.chunks) {
        CHECK(chunk.first_piece == piece && chunk.last_piece > piece,
              what + ": chunks leave a gap");
        piece = chunk.last_piece;
      }
      CHECK(piece == static_cast<int64_t>(job.table.pieces.size()),
            what + ": pieces are left over");
      std::vector<int64_t> covered(job.table.rows.size(), 0);
      for (const Piece& p : job.table.pieces) {
        CHECK(p.begin == covered[p.row] && p.count > 0, what + ": pieces leave a gap");
        covered[p.row] += p.count;
      }
      for (size_t r = 0; r < covered.size(); ++r) {
        CHECK(covered[r] == job.table.rows[r].numel, what + ": row " + std::to_string(r));
      }
      for (const Tier& tier : tiers_here()) {
        check(job, tier, one_thread, what);
        check(job, tier, three_threads, what + ", three threads");
      }
    }
  }
}

// One region over the tables of every rule: each keeps its own kernel, slots and chunks, and a
// table without rows in between changes nothing.
void test_tables() {
  std::vector<Job> jobs;
  for (const RuleInfo& rule : all_rules()) {
    const HyperValues hyper = all_variants(rule).front();
    for (const StorageTuple& storage : kStorageTuples) {
      jobs.emplace_back(rule, hyper, storage);
      Job& job = jobs.back();
      if (storage == StorageTuple{DType::kF16, DType::kF16, DType::kF32}) continue;  // no rows
      for (const int64_t n : {700, 0, 5000, 64}) job.add_row(n, n, n != 64, -1);
      job.table.cut(1024);
      job.expect();
    }
  }
  for (const Tier& tier : tiers_here()) {
    for (const RunWorkers& workers : {RunWorkers(one_thread), RunWorkers(three_threads)}) {
      std::vector<Job> runs = jobs;
      std::vector<Work> work;
      for (Job& run : runs) {
        run.connect();
        work.push_back(work_of(run, run.table, tier));
      }
      run_tables(work, workers);
      run_tables({}, workers);
      for (size_t j = 0; j < runs.size(); ++j) {
        if (!runs[j].arrays.empty()) runs[j].compare(jobs[j], "tables: " + runs[j].name(tier.name));
      }
    }
  }
}

// Every conversion of every tier's vectors, by SGD on 16-bit parameters and gradients with momentum
// buffers of float: with lr = -1, momentum = 1 and gradients of -0 a parameter of -0 becomes the
// buffer, rounded; on the first step a buffer of -1 becomes the gradient, widened.
void test_conversions() {
  const RuleInfo& rule = find_rule("sgd");
  const auto hyper_of = [&](double lr, double momentum) {
    HyperValues hyper;
    for (size_t h = 0; h < rule.hyper_names.size(); ++h) {
      const std::string key = rule.hyper_names[h].key;
      hyper.values[h] = key == "lr" ? lr : key == "momentum" ? momentum : 0.0;
    }
    return hyper;
  };
  for (const DType half : {DType::kBF16, DType::kF16}) {
    const bits16::Format format = half == DType::kBF16 ? bits16::kBF16 : bits16::kF16;
    std::vector<float> floats;
    std::vector<double> wanted;  // of them
    bits16::for_each_deciding_float(format, [&](float x) {
      floats.push_back(x);
      wanted.push_back(bits16::nearest(format, x));
    });
    const auto count = static_cast<int64_t>(floats.size());
    const StorageTuple storage{half, half, DType::kF32};
    const Job narrow(rule, hyper_of(-1.0, 1.0), storage);
    const Job wide(rule, hyper_of(0.0, 0.5), storage);
    for (const Tier& tier : tiers_here()) {
      const Kernel kernel = tier.kernel(rule.index, narrow.variant(), storage_index(storage));
      std::vector<uint16_t> rounded(floats.size(), 0x8000);
      std::vector<uint16_t> zeros(floats.size(), 0x8000);
      std::vector<float> kept = floats;
      const Span stored{rounded.data(), zeros.data(), {kept.data()}, count};
      kernel(stored, stored, Task{narrow.slot(1)});
      for (size_t i = 0; i < floats.size(); ++i) {
        ++checked;
        CHECK(bits16::same(bits16::decode(format, rounded[i]), wanted[i]),
              std::string("conversions: ") + dtype_name(half) + " on " + tier.name + " rounds " +
                  std::to_string(floats[i]) + " to pattern " + std::to_string(rounded[i]));
      }
      std::vector<uint16_t> patterns(0x10000);
      for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
      std::vector<uint16_t> params(patterns.size(), 0);
      std::vector<float> buffers(patterns.size(), -0.0f);  // whose sum with x is x, with any sign
      const Span loaded{params.data(), patterns.data(), {buffers.data()}, 0x10000};
      kernel(loaded, loaded, Task{wide.slot(0)});
      for (size_t i = 0; i < patterns.size(); ++i) {
        ++checked;
        CHECK(bits16::same(buffers[i], bits16::decode(format, patterns[i])),
              std::string("conversions: ") + dtype_name(half) + " on " + tier.name +
                  " widens pattern " + std::to_string(i) + " to " + std::to_string(buffers[i]));
      }
    }
  }
}

void test_tiers() {
  const std::vector<std::string> names = available_tiers();
  CHECK(!names.empty() && names[0] == "generic", "the generic tier runs everywhere");
  for (const std::string& name : names) {
    select_tier(name);
    CHECK(current_tier().name == name, "select_tier did not select " + name);
  }
  bool refused = false;
  try {
    select_tier("sse9");
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("generic") != std::string::npos;
  }
  CHECK(refused, "an unknown tier must be refused with the names of those there are");
  CHECK(current_tier().name == names.back(), "a refused tier must change nothing");
}

}  // namespace

int main() {
  test_tiers();
  test_conversions();
  test_chunks();
  test_sizes();
  test_layouts();
  test_surroundings();
  test_tables();
  std::string tiers;
  for (const Tier& tier : tiers_here()) tiers += std::string(tiers.empty() ? "" : ", ") + tier.name;
  std::fprintf(stderr, "driver_test: tiers %s\n", tiers.c_str());
  return check::finish("driver_test", checked);
}
