#include "cuda/update.cuh"

namespace fusedopt::cuda {
template const void* find_kernel<double, double, double>(int rule, int variant);
}  // namespace fusedopt::cuda
