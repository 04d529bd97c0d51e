#include "plan/pool.h"

#include <ATen/Parallel.h>

#include <algorithm>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it at::parallel_for runs on one thread"
#endif

namespace fusedopt {

void run_on_torch_pool(const std::function<void()>& worker) {
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) worker();
  });
}

void for_blocks(size_t rows, const std::function<void(size_t begin, size_t end)>& body) {
  // Waking the pool costs about as much as walking this many rows.
  constexpr int64_t kSerialBlocks = 8;
  const auto blocks = static_cast<int64_t>((rows + kRowBlock - 1) / kRowBlock);
  at::parallel_for(0, blocks, kSerialBlocks, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      const size_t begin = first * kRowBlock;
      body(begin, std::min(rows, begin + kRowBlock));
    }
  });
}

}  // namespace fusedopt
