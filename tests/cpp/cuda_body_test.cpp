// The bodies of the CUDA kernels, run on the host: they are plain functions of (thread, threads), so
// chunks, heads, tails, access widths and strided rows are tested without a GPU, under sanitizers
// that see an access outside an array or at an address it is not aligned for.
#include <array>

#include "bodies.h"
#include "check.h"
#include "cuda/body.h"
#include "device/image.h"
#include "job.h"

namespace {

using namespace fusedopt;
using namespace fusedopt::testing;

// Which access widths the rows of all jobs were given, so that none goes untested.
std::array<long, 1 + device::kAccessBytes> seen_widths = {};

// One launch: every chunk by every thread of a block of `threads`.
void run_launch(const Job& job, const Table& table, int64_t chunk_elements, int threads) {
  std::vector<device::DeviceRow> rows(table.rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    device::update_row(table.rows[r], table, rows[r]);
    ++seen_widths[rows[r].width];
  }
  std::vector<device::DeviceLayout> layouts;
  for (const Layout& layout : table.layouts) layouts.push_back(device::device_layout(layout));
  std::vector<device::DeviceChunk> chunks;
  device::cut(table, chunk_elements, chunks);
  const device::DeviceTable device{rows.data(), chunks.data(), layouts.data(), table.slots.data(),
                                   static_cast<int64_t>(chunks.size())};
  const RunChunk body = update_of(job.rule->index, job.variant(), storage_index(job.storage));
  for (int64_t chunk = 0; chunk < device.chunk_count; ++chunk) {
    for (int thread = 0; thread < threads; ++thread) {
      body(device, job.epilogue, chunk, thread, threads);
    }
  }
}

void check(const Job& job, int64_t chunk_elements, int threads, const std::string& what) {
  job.check(what + ": " + job.name("a CUDA body"),
            [&](const Table& table) { run_launch(job, table, chunk_elements, threads); });
}

// Sizes around every width, head and tail; chunk edges; rows that take no part; misaligned arrays.
void test_rows() {
  for_each_variant([](Job job) {
    for (int64_t n = 0; n <= 41; ++n) job.add_row(n, n, n % 7 != 3, -1);
    for (const int64_t n : {63, 64, 65, 127, 128, 129, 300}) job.add_row(n, n, true, -1);
    job.expect();
    check(job, 64, 4, "rows, chunks of 64");
    check(job, 1 << 20, 32, "rows, one chunk each");
  });
  for (const int width : {1, 2, 4, 8}) {
    CHECK(seen_widths[width] > 0, "no row had accesses of " + std::to_string(width) + " elements");
  }
}

void test_layouts() {
  const std::vector<std::vector<int64_t>> shapes = {{1}, {7}, {5, 3}, {2, 1, 9}, {3, 5, 2, 7}};
  for_each_variant([&](Job job) {
    const int arrays = 2 + job.states.count;
    for (const std::vector<int64_t>& sizes : shapes) {
      const Layout layout = make_layout(sizes, arrays);
      int64_t numel = 1;
      for (const int64_t size : sizes) numel *= size;
      job.table.layouts.push_back(layout);
      job.add_row(numel, extent_of(layout, arrays), true,
                  static_cast<int32_t>(job.table.layouts.size()) - 1);
    }
    job.expect();
    check(job, 16, 4, "layouts");
  });
}

// As in driver_test.cpp.
void test_surroundings() {
  for (const bool take : {true, false}) {
    const StepDecision decision = some_verdict(take);
    for_each_variant([&](Job job) {
      job.surround({&decision, take ? 0 : 1, take ? 1 : 0});
      for (int64_t n = 0; n <= 35; ++n) job.add_row(n, n, n % 7 != 3, -1);
      job.add_row(300, 300, true, -1);
      job.table.layouts.push_back(make_layout({3, 5, 7}, kMaxArrays));
      job.add_row(105, extent_of(job.table.layouts[0], kMaxArrays), true, 0);
      job.expect();
      check(job, 64, 4, "surroundings");
    });
  }
}

// A skipped step clears accumulators, and gradients if asked to, and touches nothing else.
void test_skips() {
  for (const bool zero : {true, false}) {
    StepDecision decision = some_verdict(true);
    decision.skip = 1;
    Job job(find_rule("adamw"), all_variants(find_rule("adamw")).front(),
            {DType::kBF16, DType::kBF16, DType::kF32});
    job.surround({&decision, zero ? 1 : 0});
    for (const int64_t n : {1, 40, 65}) job.add_row(n, n, true, -1);
    job.table.layouts.push_back(make_layout({3, 5, 7}, kMaxArrays));
    job.add_row(105, extent_of(job.table.layouts[0], kMaxArrays), true, 0);
    for (size_t r = 0; r < job.arrays.size(); ++r) {
      for (const int a : {1, 2 + kAccumulator}) {
        if (!job.has(r, a) || (a == 1 && !zero)) continue;
        for (int64_t i = 0; i < job.table.rows[r].numel; ++i) {
          job.expected[r][a].set(job.element(job.table.rows[r], a, i), 0.0);
        }
      }
    }
    Job run = job;
    run.connect();
    run_launch(run, run.table, 64, 4);
    run.compare(job, "skips", /*moves=*/false);
  }
}

// Slots prepared where kernels run are those the host writes, bit for bit; a skipped step counts for
// nothing.
void test_prepare(const RuleInfo& rule, DType dtype) {
  const RunSlot prepare_slot = prepare_of(rule.index, dtype == DType::kF64);
  for (const HyperValues& hyper : all_variants(rule)) {
    float live_lr = 0.25f;
    StepDecision decision;
    decision.skip = 1;
    const bool counts = rule.scalar_states.count > 0;
    const double initial = counts ? rule.scalar_states.states[0].initial : 0.0;
    auto counted = static_cast<float>(initial);
    double counted_in_double = 41.0;
    device::DeviceHyper hypers[2] = {{{}, 1.0}, {{}, -1.0}};
    for (device::DeviceHyper& device : hypers) {
      for (int h = 0; h < kMaxHyper; ++h) device.values[h] = device::number_of(hyper.values[h]);
    }
    hypers[1].values[0] =
        device::number_at(&live_lr, false);  // lr is the first of every rule's names
    device::PrepareSlot prepare[3];
    prepare[0].scalar_states[0] = device::number_at(&counted, false);
    prepare[1].scalar_states[0] = device::number_at(&counted_in_double, true);
    prepare[2].scalar_states[0] =
        device::number_of(6.0);  // the host counts: this is its seventh step
    for (int i = 0; i < 3; ++i) prepare[i].hyper = i % 2;
    const auto size = static_cast<size_t>(rule.slot_size(dtype));
    std::vector<std::byte> slots(3 * size);
    std::vector<std::byte> expected(3 * size);
    const device::PrepareTable table{prepare, hypers, slots.data(), 3};
    const auto run = [&] {
      for (int64_t i = 0; i < 3; ++i) prepare_slot(table, &decision, i);
    };
    run();
    const std::string what = std::string("prepare: ") + rule.name;
    CHECK(counted == initial && counted_in_double == 41.0, what + " counted a skip");
    CHECK(slots == expected, what + " wrote the slots of a skipped step");
    decision.skip = 0;
    for (int count = 1; count <= 3; ++count) {
      run();
      HyperValues with_live = hyper;
      with_live.values[0] = live_lr;
      write_slot(rule, dtype, hyper, count, 1.0, expected.data());
      write_slot(rule, dtype, with_live, 41 + count, -1.0, expected.data() + size);
      write_slot(rule, dtype, hyper, 7, 1.0, expected.data() + 2 * size);
      checked += 3;
      CHECK(slots == expected, what + " differs at step " + std::to_string(count));
      CHECK(!counts || counted == scalar_after(rule.scalar_states.states[0], count),
            what + " left the scalar state behind");
      live_lr *= 0.5f;
    }
  }
}

void test_prepare() {
  for (const RuleInfo& rule : all_rules()) {
    CHECK(rule.hyper_names[0].key == std::string("lr"), "the live value tested is not lr");
    test_prepare(rule, DType::kF32);
    test_prepare(rule, DType::kF64);
  }
}

// What of an image is to be uploaded: all of it once, then what moved and nothing else.
void test_image() {
  Table table;
  table.storage = {DType::kF32, DType::kF32, DType::kF32};
  table.states = 1;
  table.slot_size = 8;
  std::vector<float> memory(6 * 64);
  for (int r = 0; r < 6; ++r) {
    Row& row = table.rows.emplace_back();
    row.param = row.state[0] = &memory[64 * r];
    row.grad = &memory[64 * r];
    row.numel = r == 2 ? 0 : 64;
  }
  table.slots.assign(8, std::byte{1});
  for (const device::Scalars scalars : {device::Scalars::kHost, device::Scalars::kDevice}) {
    const bool on_device = scalars == device::Scalars::kDevice;
    device::Image image(table, scalars, 2, 132);
    std::vector<device::PrepareSlot> prepare(6);
    std::vector<device::DeviceHyper> hypers(2);
    const auto changes = [&] {
      std::vector<device::Range> changed;
      image.update(table, prepare, hypers, changed);
      ++checked;
      return changed;
    };
    const auto first = changes();
    CHECK(first.size() == 1 && first[0].begin == 0 && first[0].end == image.size(), "image: all");
    CHECK(changes().empty(), "image: nothing moved");
    CHECK(image.chunks() == 5, "image: an empty row has a chunk");
    table.rows[1].grad = &memory[65];
    table.rows[3].grad = nullptr;
    const auto rows = changes();
    CHECK(rows.size() == 1 && rows[0].end - rows[0].begin == 3 * sizeof(device::DeviceRow),
          "image: rows 1 to 3");
    const auto* on_board = reinterpret_cast<const device::DeviceRow*>(image.data() + rows[0].begin);
    CHECK(on_board[0].grad == &memory[65] && on_board[2].grad == nullptr, "image: its rows");
    CHECK(on_board[0].width == 1, "image: a row that moved has kept its access width");
    table.rows[5].slot = 1;
    CHECK(changes().size() == 1, "image: a slot's index");
    table.slots[3] = std::byte{7};
    CHECK(changes().size() == (on_device ? 0 : 1), "image: slots are uploaded by the host only");
    hypers[1].values[0] = device::number_of(2);
    prepare[4].scalar_states[0] = device::number_of(3);
    CHECK(changes().size() == (on_device ? 2 : 0), "image: numbers for the device");
    table.rows[1].grad = table.rows[3].grad = table.rows[0].grad;
    table.rows[5].slot = 0;
    table.slots[3] = std::byte{1};
  }
}

void test_chunk_elements() {
  const StorageTuple f32{DType::kF32, DType::kF32, DType::kF32};
  const StorageTuple bf16{DType::kBF16, DType::kBF16, DType::kF32};
  for (const StorageTuple& storage : {f32, bf16}) {
    const int64_t least = int64_t{device::kThreads} * device::vector_width(storage);
    for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{1} << 20, int64_t{1} << 33}) {
      const int64_t elements = device::chunk_elements(numel, 132, storage);
      const std::string what = "chunks of " + std::to_string(elements);
      CHECK(elements % least == 0 && elements >= least && elements <= 1 << 15, what);
      CHECK(elements == least || numel / elements >= 32 * 132, what + " leave the chip idle");
      ++checked;
    }
  }
}

}  // namespace

int main() {
  test_chunk_elements();
  test_prepare();
  test_image();
  test_rows();
  test_layouts();
  test_surroundings();
  test_skips();
  return check::finish("cuda_body_test", checked);
}
