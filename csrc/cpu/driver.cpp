#include "cpu/driver.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fusedopt {

namespace {

// Elements of a row that are gathered at a time: with five arrays of eight bytes, 40 KiB of buffers,
// inside the first-level cache of current cores.
constexpr int64_t kGatherBlock = 1024;

Span span_of(const Row& row, const StorageTuple& storage, int states, int64_t begin,
             int64_t count) {
  Span span{};
  span.param = static_cast<char*>(row.param) + begin * item_size(storage.param);
  span.grad = static_cast<const char*>(row.grad) + begin * item_size(storage.grad);
  for (int k = 0; k < states; ++k) {
    span.state[k] = static_cast<char*>(row.state[k]) + begin * item_size(storage.state);
  }
  span.count = count;
  return span;
}

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

void run_strided(const Table& table, const Row& row, const Piece& piece, const void* slot,
                 Kernel kernel) {
  const Layout& layout = table.layouts[row.layout];
  const StorageTuple& storage = table.storage;
  alignas(64) double param[kGatherBlock];
  alignas(64) double grad[kGatherBlock];
  alignas(64) double state[kMaxStates][kGatherBlock];
  for (int64_t done = 0; done < piece.count; done += kGatherBlock) {
    const int64_t begin = piece.begin + done;
    const int64_t count = std::min(kGatherBlock, piece.count - done);
    copy_array<true>(row.param, param, storage.param, layout, 0, begin, count);
    copy_array<true>(const_cast<void*>(row.grad), grad, storage.grad, layout, 1, begin, count);
    Span span{param, grad, {}, count};
    for (int k = 0; k < table.states; ++k) {
      copy_array<true>(row.state[k], state[k], storage.state, layout, 2 + k, begin, count);
      span.state[k] = state[k];
    }
    kernel(span, span, slot);
    copy_array<false>(row.param, param, storage.param, layout, 0, begin, count);
    for (int k = 0; k < table.states; ++k) {
      copy_array<false>(row.state[k], state[k], storage.state, layout, 2 + k, begin, count);
    }
  }
}

Span span_of(const Table& table, int64_t piece) {
  const Piece& at = table.pieces[piece];
  return span_of(table.rows[at.row], table.storage, table.states, at.begin, at.count);
}

// Asks for the beginnings of a piece's arrays: all of a tiny row, whose neighbours' kernels are too
// short to wait for it.
void prefetch_piece(const Span& span, int states) {
  constexpr int kLines = 4;
  for (int line = 0; line < kLines; ++line) {
    __builtin_prefetch(static_cast<const char*>(span.param) + 64 * line);
    __builtin_prefetch(static_cast<const char*>(span.grad) + 64 * line);
    for (int k = 0; k < states; ++k) {
      __builtin_prefetch(static_cast<const char*>(span.state[k]) + 64 * line);
    }
  }
}

void run_chunk(const Table& table, const Chunk& chunk, Kernel kernel) {
  constexpr int64_t kPiecesAhead = 2;
  const int64_t last = chunk.last_piece - 1;
  for (int64_t p = chunk.first_piece; p <= last; ++p) {
    if (p + kPiecesAhead <= last) prefetch_piece(span_of(table, p + kPiecesAhead), table.states);
    const Piece& piece = table.pieces[p];
    const Row& row = table.rows[piece.row];
    if (row.grad == nullptr) continue;
    const void* slot = table.slots.data() + row.slot * table.slot_size;
    if (row.layout >= 0) {
      run_strided(table, row, piece, slot, kernel);
    } else {
      kernel(span_of(table, p), span_of(table, std::min(p + 1, last)), slot);
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
      const Table& table = *work[item].table;
      run_chunk(table, table.chunks[c - before], work[item].kernel);
    }
  };
  if (total <= 1) {
    worker();  // not worth waking a pool
  } else {
    run_workers(worker);
  }
}

}  // namespace fusedopt
