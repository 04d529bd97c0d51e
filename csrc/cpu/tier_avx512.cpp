// AVX-512 (F, BW, DQ, VL: Skylake-SP and Zen 4 and newer). See tier_avx2.cpp for the pragma.
#if defined(__x86_64__)
#include <immintrin.h>

#include <string>
#include <vector>
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FUSEDOPT_TIER avx512
#define FUSEDOPT_VECTOR_BYTES 64
#include "cpu/kernels.h"
#endif
