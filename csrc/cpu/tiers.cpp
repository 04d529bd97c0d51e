#include "cpu/tiers.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

// What every tier's unit defines, in its namespace.
#define FUSEDOPT_DECLARE_KERNELS                          \
  Kernel find_kernel(int rule, int variant, int storage); \
  Kernel find_norm(DType grad, DType compute);            \
  Kernel find_accumulate(DType grad, DType compute);

namespace fusedopt {

namespace generic {
FUSEDOPT_DECLARE_KERNELS
}  // namespace generic
namespace {
bool always() { return true; }
}  // namespace

#if defined(__x86_64__)
namespace avx2 {
FUSEDOPT_DECLARE_KERNELS
}  // namespace avx2
namespace avx512 {
FUSEDOPT_DECLARE_KERNELS
}  // namespace avx512

namespace {
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace
#endif

const std::vector<Tier>& built_tiers() {
  static const std::vector<Tier> tiers = {
#define FUSEDOPT_TIER_OF(name, supported) \
  {#name, supported, name::find_kernel, name::find_norm, name::find_accumulate}
      FUSEDOPT_TIER_OF(generic, always),
#if defined(__x86_64__)
      FUSEDOPT_TIER_OF(avx2, has_avx2),
      FUSEDOPT_TIER_OF(avx512, has_avx512),
#endif
#undef FUSEDOPT_TIER_OF
  };
  return tiers;
}

std::vector<std::string> available_tiers() {
  std::vector<std::string> names;
  for (const Tier& tier : built_tiers()) {
    if (tier.supported()) names.emplace_back(tier.name);
  }
  return names;
}

namespace {

std::atomic<const Tier*> selected{nullptr};

const Tier& find_tier(const std::string& name, const std::string& who) {
  std::string names;
  for (const Tier& tier : built_tiers()) {
    if (!tier.supported()) continue;
    if (name == tier.name) return tier;
    names += (names.empty() ? "" : ", ") + std::string(tier.name);
  }
  throw std::runtime_error(who + "='" + name + "' is not a CPU instruction tier this machine can " +
                           "run; choose one of: " + names + ", or unset it for the fastest");
}

}  // namespace

const Tier& current_tier() {
  const Tier* tier = selected.load(std::memory_order_relaxed);
  if (tier != nullptr) return *tier;
  const char* forced = std::getenv("FUSEDOPT_CPU_TIER");
  const std::string name = forced != nullptr ? forced : available_tiers().back();
  const Tier& found = find_tier(name, "FUSEDOPT_CPU_TIER");
  selected.store(&found, std::memory_order_relaxed);
  return found;
}

void select_tier(const std::string& name) {
  selected.store(&find_tier(name, "tier"), std::memory_order_relaxed);
}

}  // namespace fusedopt
