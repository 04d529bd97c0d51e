// torch's own thread pool, for the CPU driver.
#pragma once

#include <cstddef>
#include <functional>

namespace fusedopt {

// A RunWorkers: as many workers as torch.get_num_threads(). Built with -fopenmp this is the pool
// torch's operators run on; without, torch's header would run everything on one thread, silently.
void run_on_torch_pool(const std::function<void()>& worker);

// Blocks of rows small enough that what they hang from fits the first-level cache.
constexpr size_t kRowBlock = 16;

// Calls body(begin, end) for blocks of at most kRowBlock rows, on the pool where that pays.
void for_blocks(size_t rows, const std::function<void(size_t begin, size_t end)>& body);

}  // namespace fusedopt
