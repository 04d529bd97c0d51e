// The table as CUDA kernels read it: plain structs in device memory, and how they are made from the
// rows of core/table.h. Torch-free and free of CUDA: the host fills them, tests read them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/decision.h"
#include "core/table.h"

namespace fusedopt::device {

// Threads of a block, for which chunks are cut.
constexpr int kThreads = 256;

// What one access moves at most. All widths below are in elements.
constexpr int kAccessBytes = 16;

// Elements that a thread updates at a time where it can: as many of the smallest type as an access
// moves. Larger types take several accesses.
constexpr int vector_width(StorageTuple storage) {
  const int param = item_size(storage.param);
  const int grad = item_size(storage.grad);
  const int state = item_size(storage.state);
  const int least = param < grad ? param : grad;
  return kAccessBytes / (least < state ? least : state);
}

struct DeviceRow {
  void* param;
  void* grad;
  void* state[kMaxRowStates];  // as in core/table.h
  int64_t norm_block;
  int32_t slot;
  int32_t layout;  // index into the layouts; -1: all arrays run through memory in one order
  int32_t width;   // elements an access may move once `head` elements have been passed
  int32_t head;
};

// A piece of a row, for one block of threads.
struct DeviceChunk {
  int64_t begin;
  int32_t count;
  int32_t row;
};

// How to walk a row whose arrays do not share one memory order. A fixed number of dimensions, so
// that layouts lie in device memory as they are: dimensions of one element are left out, and no
// tensor has more of two and above.
constexpr int kMaxDims = 64;
struct DeviceLayout {
  int32_t dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxArrays][kMaxDims];
};

// Everything a launch reads besides the arrays. Pointers into device memory.
struct DeviceTable {
  const DeviceRow* rows;
  const DeviceChunk* chunks;
  const DeviceLayout* layouts;
  const void* slots;
  int64_t chunk_count;
};

// Where the sums of a norm go, and who makes a decision of them.
struct Measure {
  NormSums* blocks;
  int64_t block_count;
  NormSums* total;  // of all blocks; null: nobody asks for it
  StepDecision* decision;
  int32_t last;     // the last launch over these blocks: it sums them up
  int32_t decides;  // and makes the decision
};

// Makes `row` the image of a table's row, with the widest access that all its arrays allow and the
// elements before the first of them. Returns whether anything in it is new.
bool update_row(const Row& from, const Table& table, DeviceRow& row);

DeviceLayout device_layout(const Layout& layout);

// Cuts rows into chunks of `elements`, a multiple of every vector width, in address order.
void cut(const Table& table, int64_t elements, std::vector<DeviceChunk>& chunks);

// Elements a chunk, whole blocks of a norm, so that `multiprocessors` have at least 32 chunks each where the table is large
// enough, and a chunk is at least an access a thread.
int64_t chunk_elements(int64_t numel, int multiprocessors, const StorageTuple& storage);

}  // namespace fusedopt::device
