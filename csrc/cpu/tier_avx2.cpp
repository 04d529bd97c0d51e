// AVX2 and F16C. The instruction set is chosen here and not on the command line, so that one set of
// flags builds every file, and before any header, so that it covers what they define. No FMA: the
// rules' two roundings must stay two.
#if defined(__x86_64__)
#include <immintrin.h>

#include <string>
#include <vector>
#pragma GCC target("avx2,f16c")
#define FUSEDOPT_TIER avx2
#define FUSEDOPT_VECTOR_BYTES 32
#include "cpu/kernels.h"
#endif
