#include "cuda/update.cuh"

namespace fusedopt::cuda {
template const void* find_kernel<F16, F16, F16>(int rule, int variant);
template const void* find_kernel<F16, F16, float>(int rule, int variant);
template const void* find_kernel<F16, float, F16>(int rule, int variant);
template const void* find_kernel<F16, float, float>(int rule, int variant);
}  // namespace fusedopt::cuda
