#include "plan/pool.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it at::parallel_for runs on one thread"
#endif

namespace fusedopt {

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A region of OpenMP ends when every thread of the pool has been there: where these sleep, as beside
// a GPU, waking sixteen of them takes longer than walking a thousand rows. Here the calling thread
// begins at once, takes block after block, and waits for blocks that others have begun, not for
// threads: one that wakes up too late finds nothing to do.
class Helpers {
 public:
  using Body = std::function<void(int64_t block)>;

  // Calls body(0) to body(blocks - 1), on `threads` threads at most.
  void run(int64_t blocks, int threads, const Body& body) {
    // Somebody else's walk has them, or did when this process was forked.
    const std::unique_lock<std::mutex> mine(mutex_, std::try_to_lock);
    if (!mine.owns_lock()) {
      for (int64_t block = 0; block < blocks; ++block) body(block);
      return;
    }
    grow(threads - 1);
    most_.store(threads - 1, std::memory_order_relaxed);
    body_ = &body;
    unfinished_.store(blocks, std::memory_order_relaxed);
    left_.store(uint64_t{++job_} << 32 | static_cast<uint32_t>(blocks), std::memory_order_release);
    signal_.store(job_, std::memory_order_release);
    signal_.notify_all();
    while (take_one()) {
    }
    for (int turns = 0; unfinished_.load(std::memory_order_acquire) != 0; ++turns) {
      turns % 1024 == 1023 ? std::this_thread::yield() : pause();
    }
  }

 private:
  // Takes a block that is left of whatever job there is, and does it.
  bool take_one() {
    uint64_t left = left_.load(std::memory_order_acquire);
    do {
      if (static_cast<uint32_t>(left) == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
    // The job does not end before this block does, so it is still there.
    (*body_)(static_cast<uint32_t>(left) - 1);
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  void help(int number) {
    constexpr std::chrono::microseconds kSpin{
        50};  // from the walk before a launch to that after it
    uint32_t seen = 0;
    for (;;) {
      const auto end = std::chrono::steady_clock::now() + kSpin;
      while (signal_.load(std::memory_order_acquire) == seen) {
        for (int turn = 0; turn < 16; ++turn) pause();
        if (std::chrono::steady_clock::now() > end) break;
      }
      signal_.wait(seen, std::memory_order_acquire);
      seen = signal_.load(std::memory_order_acquire);
      while (number < most_.load(std::memory_order_relaxed) && take_one()) {
      }
    }
  }

  void grow(int count) {
    if (count <= started_) return;
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
      for (; started_ < count; ++started_) {
        std::thread([this, number = started_] { help(number); }).detach();
      }
    } catch (const std::system_error&) {  // then there are fewer
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  std::mutex mutex_;
  int started_ = 0;
  uint32_t job_ = 0;
  const Body* body_ = nullptr;
  std::atomic<int> most_{0};
  std::atomic<uint64_t> left_{0};  // a job's number, and how many of its blocks nobody has taken
  std::atomic<int64_t> unfinished_{0};
  std::atomic<uint32_t> signal_{0};  // the last job's number
};

// Never destroyed: threads wait in it until the process ends.
Helpers& helpers() {
  static auto* helpers = new Helpers();
  return *helpers;
}

}  // namespace

void run_on_torch_pool(const std::function<void()>& worker) {
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) worker();
  });
}

void for_blocks(size_t rows, Walkers walkers,
                const std::function<void(size_t begin, size_t end)>& body) {
  // Waking anybody costs about as much as walking this many rows.
  constexpr int64_t kSerialBlocks = 8;
  constexpr int kMostThreads = 8;
  const auto blocks = static_cast<int64_t>((rows + kRowBlock - 1) / kRowBlock);
  const auto one = [&](int64_t block) {
    const size_t begin = block * kRowBlock;
    body(begin, std::min(rows, begin + kRowBlock));
  };
  if (walkers == Walkers::kTorchPool) {
    at::parallel_for(0, blocks, kSerialBlocks, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) one(first);
    });
    return;
  }
  const int threads = std::min(at::get_num_threads(), kMostThreads);
  if (blocks > kSerialBlocks && threads > 1) return helpers().run(blocks, threads, one);
  for (int64_t block = 0; block < blocks; ++block) one(block);
}

}  // namespace fusedopt
