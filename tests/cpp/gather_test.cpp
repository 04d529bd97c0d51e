// The gather of data/gather.h: every byte of every row, nothing beside them, on any number of threads.
#include "data/gather.h"

#include <cstring>
#include <random>
#include <thread>

#include "check.h"

namespace {

using namespace fusedopt;

long checked = 0;

RunWorkers threads(int number) {
  return [number](const std::function<void()>& worker) {
    std::vector<std::thread> started;
    for (int i = 1; i < number; ++i) started.emplace_back(worker);
    worker();
    for (std::thread& thread : started) thread.join();
  };
}

struct Case {
  int64_t bytes;   // of a row
  int64_t stride;  // from a row to the next
  int64_t rows;
  int64_t count;
  int64_t offset;  // of the batch, from an aligned address
};

std::string described(const Case& c, bool indexed) {
  return std::to_string(c.count) + " of " + std::to_string(c.rows) + " rows of " +
         std::to_string(c.bytes) + " bytes, " + std::to_string(c.stride) + " apart, at offset " +
         std::to_string(c.offset) + (indexed ? ", by index" : ", in order");
}

constexpr char kUntouched = 0x5a;

// Source and batch are of exactly the size they need, so that AddressSanitizer sees a step outside.
void test(const Case& c, bool indexed, int workers, std::mt19937_64& random) {
  std::vector<char> source(static_cast<size_t>(c.rows > 0 ? (c.rows - 1) * c.stride + c.bytes : 0));
  std::vector<uint64_t> words(source.size() / sizeof(uint64_t) + 1);
  for (uint64_t& word : words) word = random();
  if (!source.empty()) std::memcpy(source.data(), words.data(), source.size());
  std::vector<char> batch(static_cast<size_t>(c.offset + c.count * c.bytes), kUntouched);
  std::vector<int64_t> index(static_cast<size_t>(c.count));
  const int64_t first = indexed ? 0 : c.rows - c.count;
  for (int64_t i = 0; i < c.count; ++i) {
    index[i] = indexed ? static_cast<int64_t>(random() % c.rows) : first + i;
  }
  // Beside it a source of short rows, as labels are.
  std::vector<int64_t> labels(static_cast<size_t>(c.rows));
  for (int64_t r = 0; r < c.rows; ++r) labels[r] = r;
  std::vector<int64_t> chosen(static_cast<size_t>(c.count), -1);
  gather_rows({{source.data(), c.stride, c.bytes, batch.data() + c.offset},
               {reinterpret_cast<const char*>(labels.data()), 8, 8,
                reinterpret_cast<char*>(chosen.data())}},
              indexed ? index.data() : nullptr, first, c.count, threads(workers));
  for (int64_t i = 0; i < c.offset; ++i) {
    ++checked;
    CHECK(batch[i] == kUntouched, described(c, indexed) + ": wrote before the batch");
  }
  for (int64_t i = 0; i < c.count; ++i) {
    checked += 2;
    CHECK(chosen[i] == index[i], described(c, indexed) + ": label " + std::to_string(i));
    CHECK(c.bytes == 0 || std::memcmp(batch.data() + c.offset + i * c.bytes,
                                      source.data() + index[i] * c.stride, c.bytes) == 0,
          described(c, indexed) + ": row " + std::to_string(i));
  }
}

void test_range() {
  const std::vector<int64_t> index{3, 0, 9, 10, -1};
  const auto first = [&](int64_t count, int64_t rows) {
    ++checked;
    return first_outside(index.data(), count, rows);
  };
  CHECK(first(3, 10) == -1, "all inside");
  CHECK(first(5, 10) == 3, "the first that is too large");
  CHECK(first(5, 11) == 4, "a negative one");
  CHECK(first(5, 3) == 0, "the very first");
  CHECK(first(0, 0) == -1, "none");
}

}  // namespace

int main() {
  std::mt19937_64 random(7);
  for (const int64_t bytes : {0, 1, 2, 3, 4, 7, 8, 12, 63, 64, 65, 784, 4096, 5000, 40'000}) {
    for (const int64_t gap : {0, 1, 64}) {
      for (const int64_t count : {0, 1, 2, 17, 300}) {
        for (const bool indexed : {false, true}) {
          const int64_t rows = indexed ? 29 : count + 3;
          for (const int workers : {1, 3}) {
            test({bytes, bytes + gap, rows, count, int64_t(random() % 9)}, indexed, workers,
                 random);
          }
        }
      }
    }
  }
  test({16, 0, 5, 40, 0}, true, 2, random);  // one row, many times over
  test_range();
  return check::finish("gather_test", checked);
}
