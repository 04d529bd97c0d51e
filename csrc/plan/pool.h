// torch's own thread pool, for the CPU driver.
#pragma once

#include <functional>

namespace fusedopt {

// A RunWorkers: as many workers as torch.get_num_threads(). Built with -fopenmp this is the pool
// torch's operators run on; without, torch's header would run everything on one thread, silently.
void run_on_torch_pool(const std::function<void()>& worker);

}  // namespace fusedopt
