#include "data/gather.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fusedopt {

namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line
// Bytes that a thread copies at a time: large enough to hide the cost of the shared counter, small
// enough that threads finish at about the same time.
constexpr int64_t kPieceBytes = 128 * 1024;
// Waking the worker threads pays off above this size; the caller copies smaller batches alone.
constexpr int64_t kSerialBytes = 64 * 1024;
// Prefetch distance, in bytes of the batch. Rows are at random addresses, which the hardware
// prefetcher cannot predict.
constexpr int64_t kAheadBytes = 8192;

struct Rows {
  const RowSource& source;
  const int64_t* index;
  int64_t first;

  const char* at(int64_t i) const {
    return source.rows + (index == nullptr ? first + i : index[i]) * source.stride;
  }
};

template <int64_t kBytes>
void copy_short(const Rows& rows, int64_t begin, int64_t end) {
  char* to = rows.source.batch + begin * kBytes;
  for (int64_t i = begin; i < end; ++i, to += kBytes) std::memcpy(to, rows.at(i), kBytes);
}

void copy_long(const Rows& rows, int64_t begin, int64_t end, int64_t count) {
  const int64_t bytes = rows.source.bytes;
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / std::max<int64_t>(bytes, 1));
  const int64_t prefetched = std::min(bytes, kAheadBytes);
  char* to = rows.source.batch + begin * bytes;
  for (int64_t i = begin; i < end; ++i, to += bytes) {
    if (i + ahead < count) {
      const char* next = rows.at(i + ahead);
      for (int64_t line = 0; line < prefetched; line += kLine) __builtin_prefetch(next + line);
    }
    std::memcpy(to, rows.at(i), static_cast<size_t>(bytes));
  }
}

void copy(const Rows& rows, int64_t begin, int64_t end, int64_t count) {
  switch (rows.source.bytes) {
    case 0:
      return;
    case 1:
      return copy_short<1>(rows, begin, end);
    case 2:
      return copy_short<2>(rows, begin, end);
    case 4:
      return copy_short<4>(rows, begin, end);
    case 8:
      return copy_short<8>(rows, begin, end);
    default:
      return copy_long(rows, begin, end, count);
  }
}

}  // namespace

int64_t first_outside(const int64_t* index, int64_t count, int64_t rows) {
  const auto limit = static_cast<uint64_t>(rows);
  const auto outside = [limit](int64_t i) { return static_cast<uint64_t>(i) >= limit; };
  const int64_t* found = std::find_if(index, index + count, outside);
  return found == index + count ? -1 : found - index;
}

void gather_rows(const std::vector<RowSource>& sources, const int64_t* index, int64_t first,
                 int64_t count, const RunWorkers& run) {
  struct Piece {
    const RowSource* source;
    int64_t begin;
    int64_t end;
  };
  std::vector<Piece> pieces;
  int64_t bytes = 0;
  for (const RowSource& source : sources) {
    const int64_t length = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(source.bytes, 1));
    for (int64_t begin = 0; begin < count; begin += length) {
      pieces.push_back({&source, begin, std::min(count, begin + length)});
    }
    bytes += source.bytes * count;
  }
  std::atomic<size_t> next{0};
  const auto worker = [&] {
    for (size_t p = next++; p < pieces.size(); p = next++) {
      const Piece& piece = pieces[p];
      copy({*piece.source, index, first}, piece.begin, piece.end, count);
    }
  };
  if (bytes <= kSerialBytes) {
    worker();
  } else {
    run(worker);
  }
}

}  // namespace fusedopt
