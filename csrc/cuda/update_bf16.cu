#include "cuda/update.cuh"

namespace fusedopt::cuda {
template const void* find_kernel<BF16, BF16, BF16>(int rule, int variant);
template const void* find_kernel<BF16, BF16, float>(int rule, int variant);
template const void* find_kernel<BF16, float, BF16>(int rule, int variant);
template const void* find_kernel<BF16, float, float>(int rule, int variant);
}  // namespace fusedopt::cuda
