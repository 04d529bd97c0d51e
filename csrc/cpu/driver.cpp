#include "cpu/driver.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fusedopt {

namespace {

// Elements of a row that are gathered at a time: blocks of a norm, and buffers that stay inside the
// second-level cache of current cores.
constexpr int64_t kGatherBlock = kNormBlock;

// Whether a kind of work reads an array, and whether it writes it.
bool reads(const Work& work, int array) {
  if (!work.table->has(array)) return false;
  return work.kind == Work::Kind::kUpdate || array == 1 || array == 2 + kAccumulator;
}
bool writes(const Work& work, int array) {
  if (work.kind == Work::Kind::kNorm || !reads(work, array)) return false;
  return array != 1 || work.epilogue.zero_grads != 0 || work.epilogue.write_grads != 0;
}

void* array_of(const Row& row, int array) {
  return array == 0 ? row.param : array == 1 ? row.grad : row.state[array - 2];
}
void set_array(Span& span, int array, void* to) {
  (array == 0 ? span.param : array == 1 ? span.grad : span.state[array - 2]) = to;
}

// The arrays that a kind of work reads, by their bytes an element; 0 for the others.
class Arrays {
 public:
  explicit Arrays(const Work& work) : table_(*work.table) {
    for (int a = 0; a < kMaxArrays; ++a) {
      bytes_[a] = reads(work, a) ? item_size(table_.dtype(a)) : 0;
    }
  }

  Span of(int64_t piece_index) const {
    const Piece& piece = table_.pieces[piece_index];
    const Row& row = table_.rows[piece.row];
    Span span{};
    span.param = at(row.param, 0, piece);
    span.grad = at(row.grad, 1, piece);
    for (int k = 0; k < kMaxRowStates; ++k) span.state[k] = at(row.state[k], 2 + k, piece);
    span.count = piece.count;
    return span;
  }

 private:
  void* at(void* array, int index, const Piece& piece) const {
    if (array == nullptr || bytes_[index] == 0) return nullptr;
    return static_cast<char*>(array) + piece.begin * bytes_[index];
  }

  const Table& table_;
  int64_t bytes_[kMaxArrays];
};

// Copies `count` elements, from `begin` in the layout's logical order, between a strided array and
// a contiguous buffer: the innermost dimension in a loop, the others as an odometer.
template <class Element, bool kGather>
void copy_strided(char* array, char* buffer, const Layout& layout, int index, int64_t begin,
                  int64_t count) {
  const std::vector<int64_t>& strides = layout.strides[index];
  const int dims = static_cast<int>(layout.sizes.size());
  std::vector<int64_t> at(dims);
  int64_t offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    at[d] = begin % layout.sizes[d];
    begin /= layout.sizes[d];
    offset += at[d] * strides[d];
  }
  auto* elements = reinterpret_cast<Element*>(array);
  auto* contiguous = reinterpret_cast<Element*>(buffer);
  const int inner = dims - 1;
  while (count > 0) {
    const int64_t run = std::min(count, layout.sizes[inner] - at[inner]);
    for (int64_t i = 0; i < run; ++i) {
      if constexpr (kGather) {
        contiguous[i] = elements[offset + i * strides[inner]];
      } else {
        elements[offset + i * strides[inner]] = contiguous[i];
      }
    }
    contiguous += run;
    count -= run;
    offset -= at[inner] * strides[inner];
    at[inner] = 0;
    for (int d = inner - 1; d >= 0; --d) {
      offset += strides[d];
      if (++at[d] < layout.sizes[d]) break;
      offset -= at[d] * strides[d];
      at[d] = 0;
    }
  }
}

template <bool kGather>
void copy_array(void* array, void* buffer, DType dtype, const Layout& layout, int index,
                int64_t begin, int64_t count) {
  auto* a = static_cast<char*>(array);
  auto* b = static_cast<char*>(buffer);
  switch (item_size(dtype)) {
    case 8:
      return copy_strided<uint64_t, kGather>(a, b, layout, index, begin, count);
    case 4:
      return copy_strided<uint32_t, kGather>(a, b, layout, index, begin, count);
    default:
      return copy_strided<uint16_t, kGather>(a, b, layout, index, begin, count);
  }
}

void run_strided(const Work& work, const Row& row, const Piece& piece, Task task) {
  const Table& table = *work.table;
  const Layout& layout = table.layouts[row.layout];
  alignas(64) double buffers[kMaxArrays][kGatherBlock];
  for (int64_t done = 0; done < piece.count; done += kGatherBlock) {
    const int64_t begin = piece.begin + done;
    const int64_t count = std::min(kGatherBlock, piece.count - done);
    Span span{};
    span.count = count;
    for (int a = 0; a < kMaxArrays; ++a) {
      void* array = array_of(row, a);
      if (array == nullptr || !reads(work, a)) continue;
      copy_array<true>(array, buffers[a], table.dtype(a), layout, a, begin, count);
      set_array(span, a, buffers[a]);
    }
    work.kernel(span, span, task);
    if (task.sums != nullptr) ++task.sums;
    for (int a = 0; a < kMaxArrays; ++a) {
      void* array = array_of(row, a);
      if (array == nullptr || !writes(work, a)) continue;
      copy_array<false>(array, buffers[a], table.dtype(a), layout, a, begin, count);
    }
  }
}

// Asks for the beginnings of a piece's arrays: all of a tiny row, whose neighbours' kernels are too
// short to wait for it.
void prefetch_piece(const Span& span) {
  const auto ask = [](const void* array) {
    if (array == nullptr) return;
    constexpr int kLines = 4;
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(static_cast<const char*>(array) + 64 * line);
    }
  };
  ask(span.param);
  ask(span.grad);
  for (const void* state : span.state) ask(state);
}

bool takes_part(const Work& work, const Row& row) {
  if (row.grad != nullptr) return true;
  return work.kind != Work::Kind::kAccumulate && row.state[kAccumulator] != nullptr;
}

void run_chunk(const Work& work, const Chunk& chunk) {
  constexpr int64_t kPiecesAhead = 2;
  const Table& table = *work.table;
  const int64_t last = chunk.last_piece - 1;
  const Arrays arrays(work);
  Task task;
  task.epilogue = work.epilogue;
  task.in = work.in;
  for (int64_t p = chunk.first_piece; p <= last; ++p) {
    if (p + kPiecesAhead <= last) prefetch_piece(arrays.of(p + kPiecesAhead));
    const Piece& piece = table.pieces[p];
    const Row& row = table.rows[piece.row];
    if (work.sums != nullptr) {
      task.sums = work.sums + row.norm_block + piece.begin / kNormBlock;
      std::fill_n(task.sums, norm_blocks(piece.count), NormSums{});
    }
    if (!takes_part(work, row)) continue;
    task.slot = table.slots.data() + row.slot * table.slot_size;
    if (row.layout >= 0) {
      run_strided(work, row, piece, task);
    } else {
      work.kernel(arrays.of(p), arrays.of(std::min(p + 1, last)), task);
    }
  }
}

}  // namespace

void run_tables(const std::vector<Work>& work, const RunWorkers& run_workers) {
  size_t total = 0;
  for (const Work& item : work) total += item.table->chunks.size();
  std::atomic<size_t> next{0};
  const auto worker = [&] {
    size_t item = 0;
    size_t before = 0;  // chunks of the items before this one
    for (size_t c = next++; c < total; c = next++) {
      while (c - before >= work[item].table->chunks.size()) {
        before += work[item++].table->chunks.size();
      }
      run_chunk(work[item], work[item].table->chunks[c - before]);
    }
  };
  if (total <= 1) {
    worker();  // not worth waking a pool
  } else {
    run_workers(worker);
  }
}

}  // namespace fusedopt
