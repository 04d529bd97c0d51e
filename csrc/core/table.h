// The tensor table: what a plan hands to a driver. Plain structs, torch-free.
//
// A row is one tensor: pointers to the parameter, its gradient and its states, a length, and the
// index of the scalar slot (one a distinct group and set of scalar states) that its update reads.
// Long rows are cut into pieces and short rows gathered, so that every chunk is about the same work;
// threads (or thread blocks) take chunks in address order. All arithmetic on sizes is 64-bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fusedopt {

// Array 0 is the parameter, 1 the gradient, 2 and up the rule's states; the last two are the driver's,
// in the type of the arithmetic: what gradients are accumulated in, and the average of the parameter.
constexpr int kAccumulator = kMaxStates;
constexpr int kAverage = kMaxStates + 1;
constexpr int kMaxRowStates = kMaxStates + 2;
constexpr int kMaxArrays = 2 + kMaxRowStates;

struct Row {
  void* param = nullptr;
  void* grad = nullptr;  // null: there is none in this step
  // By their place; null where the row has none, or where an accumulator is empty. A row without a
  // gradient and an accumulator takes no part in this step.
  void* state[kMaxRowStates] = {};
  int64_t numel = 0;
  int64_t norm_block = 0;  // where the sums of its first block go
  int32_t slot = 0;
  int32_t layout = -1;  // index into Table::layouts; -1: all arrays run through memory in one order
};

// How to walk a row whose arrays do not share one memory order: element (i0, .., in) of array a
// lies at sum(i * strides[a]), counted in elements.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[kMaxArrays];
};

struct Piece {
  int32_t row;
  int64_t begin;
  int64_t count;
};

struct Chunk {
  int64_t first_piece;
  int64_t last_piece;  // one past
};

// What a kernel reads besides the arrays. `grad_factor` is -1 under maximize, 1 otherwise.
template <class T, class RuleScalars>
struct Slot {
  T grad_factor;
  RuleScalars scalars;
};

struct Table {
  StorageTuple storage;
  int states = 0;            // of the rule
  bool accumulates = false;  // rows have accumulators
  bool averages = false;     // and averages of the parameters
  std::vector<Row> rows;
  std::vector<Layout> layouts;
  std::vector<Piece> pieces;
  std::vector<Chunk> chunks;
  std::vector<std::byte> slots;
  int64_t slot_size = 0;

  int64_t numel() const;

  // The type of an array's elements; whether rows have it.
  DType dtype(int array) const;
  bool has(int array) const;

  // Cuts the rows into chunks of about `elements` elements. Call once the rows are complete.
  void cut(int64_t elements);
};

// 64K elements: large enough that taking a chunk costs nothing beside it, small enough that two
// threads end together on a model of a few million parameters.
constexpr int64_t kCpuChunkElements = 64 * 1024;

}  // namespace fusedopt
