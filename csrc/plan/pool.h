// The threads of a step: torch's own pool for the CPU driver, and helpers for a plan's walks.
#pragma once

#include <cstddef>
#include <functional>

namespace fusedopt {

// A RunWorkers: as many workers as torch.get_num_threads(). Built with -fopenmp this is the pool
// torch's operators run on; without, torch's header would run everything on one thread, silently.
void run_on_torch_pool(const std::function<void()>& worker);

// Blocks of rows small enough that what they hang from fits the first-level cache.
constexpr size_t kRowBlock = 16;

// Who walks beside the calling thread.
enum class Walkers {
  kTorchPool,  // spins already, where the CPU driver has work every step
  kHelpers,    // join when they have woken up: nobody waits for a thread that sleeps
};

// Calls body(begin, end) for blocks of at most kRowBlock rows, on several threads where that pays,
// never more than torch.get_num_threads(). `body` does not throw.
void for_blocks(size_t rows, Walkers walkers,
                const std::function<void(size_t begin, size_t end)>& body);

}  // namespace fusedopt
