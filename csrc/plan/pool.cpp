#include "plan/pool.h"

#include <ATen/Parallel.h>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it at::parallel_for runs on one thread"
#endif

namespace fusedopt {

void run_on_torch_pool(const std::function<void()>& worker) {
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) worker();
  });
}

}  // namespace fusedopt
