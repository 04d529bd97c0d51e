// Gathers rows of arrays into batches in host memory, on all threads. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/driver.h"

namespace fusedopt {

// An array of rows, and the contiguous batch that rows are copied to.
struct RowSource {
  const char* rows;
  int64_t stride;  // bytes from a row to the next
  int64_t bytes;   // of a row
  char* batch;
};

// The first of `count` indices that is outside of [0, rows), or -1.
int64_t first_outside(const int64_t* index, int64_t count, int64_t rows);

// Copies rows index[0], ..., index[count - 1] of every source, or rows first, ..., first + count - 1 if
// `index` is null. Indices must be in range. Returns when all rows are copied.
void gather_rows(const std::vector<RowSource>& sources, const int64_t* index, int64_t first,
                 int64_t count, const RunWorkers& run);

}  // namespace fusedopt
