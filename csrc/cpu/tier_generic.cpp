// Code for every machine the compiler's default target covers (SSE2 on x86-64).
#define FUSEDOPT_TIER generic
#define FUSEDOPT_VECTOR_BYTES 16
#include "cpu/kernels.h"
