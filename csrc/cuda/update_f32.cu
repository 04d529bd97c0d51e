#include "cuda/update.cuh"

namespace fusedopt::cuda {
template const void* find_kernel<float, float, float>(int rule, int variant);
}  // namespace fusedopt::cuda
