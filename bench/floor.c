/* The traffic floor of a CPU: the reads and writes of an optimizer's step, without its arithmetic.
 *
 * A row holds the arrays of one parameter: the parameter, its gradient, its states, all of as many
 * bytes. A pass reads all of them and writes all but the gradient, adding the gradient's words, so
 * that nothing can be left out. Chunks and prefetches are those of fusedopt's own kernels.
 * fusedopt.bench.floor compiles this file when it is first used.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  kMaxArrays = 8,
  kVector = 64,        /* bytes; compilers split it where registers are narrower */
  kAhead = 1024,       /* bytes between a load and the prefetch for it */
  kChunk = 256 * 1024, /* bytes of an array that a thread takes at a time: 64K floats */
  kPieceCost = 1024,   /* what the beginning of a piece costs, in bytes */
  kPiecesAhead = 2,
};

typedef uint32_t Vector __attribute__((vector_size(kVector), aligned(1), may_alias));

typedef struct {
  char* array[kMaxArrays];
  int64_t bytes;
} Piece;

typedef struct {
  int width;
  int64_t chunks;
  Piece* pieces;
  int64_t* first; /* piece of a chunk, and one past the last */
  uint32_t* sums; /* of a chunk: what keeps the compiler from not reading */
} Floor;

void floor_free(Floor* floor) {
  if (floor == NULL) return;
  free(floor->pieces);
  free(floor->first);
  free(floor->sums);
  free(floor);
}

/* Over `rows` x `width` addresses and as many sizes as there are rows; NULL without memory. */
Floor* floor_new(char* const* arrays, const int64_t* bytes, int64_t rows, int width) {
  int64_t most = rows;
  for (int64_t r = 0; r < rows; ++r) most += bytes[r] / kVector * kVector / kChunk + 1;
  Floor* floor = calloc(1, sizeof *floor);
  if (floor == NULL || width > kMaxArrays) {
    floor_free(floor);
    return NULL;
  }
  floor->width = width;
  floor->pieces = calloc(2 * most + 1, sizeof *floor->pieces);
  floor->first = calloc(2 * most + 1, sizeof *floor->first);
  floor->sums = calloc(2 * most + 1, sizeof *floor->sums);
  if (floor->pieces == NULL || floor->first == NULL || floor->sums == NULL) {
    floor_free(floor);
    return NULL;
  }
  int64_t piece = 0;
  int64_t room = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = 0; begin < bytes[r];) {
      if (room <= 0) {
        floor->first[floor->chunks++] = piece;
        room = kChunk;
      }
      const int64_t fits = (room + kVector - 1) / kVector * kVector;
      const int64_t left = bytes[r] - begin;
      Piece* made = &floor->pieces[piece++];
      made->bytes = left < fits ? left : fits;
      for (int a = 0; a < width; ++a) made->array[a] = arrays[r * width + a] + begin;
      begin += made->bytes;
      room -= made->bytes + kPieceCost;
    }
  }
  floor->first[floor->chunks] = piece;
  return floor;
}

static inline __attribute__((always_inline)) void move_piece(const Piece* piece, const Piece* next,
                                                             int width, int zero) {
  const int64_t whole = piece->bytes / kVector * kVector;
  const int64_t ends[] = {whole > kAhead ? whole - kAhead : 0, whole};
  char* array[kMaxArrays];
  uintptr_t ahead[kMaxArrays];
  for (int a = 0; a < width; ++a) {
    array[a] = piece->array[a];
    ahead[a] = (uintptr_t)array[a] + kAhead;
  }
  int64_t i = 0;
  for (int part = 0; part < 2; ++part) {
    for (; i < ends[part]; i += kVector) {
      Vector value[kMaxArrays];
      for (int a = 0; a < width; ++a) __builtin_prefetch((const void*)(ahead[a] + i), 0, 2);
      for (int a = 0; a < width; ++a) value[a] = *(const Vector*)(array[a] + i);
      for (int a = 0; a < width; ++a) {
        if (a != 1) *(Vector*)(array[a] + i) = value[a] + value[1];
      }
      if (zero) *(Vector*)(array[1] + i) = (Vector){0};
    }
    /* Ahead of the last bytes lie the first ones of the next piece. */
    for (int a = 0; a < width; ++a) ahead[a] = (uintptr_t)next->array[a] - i;
  }
  if (i == piece->bytes) return;
  Vector last[kMaxArrays];
  const int64_t rest = piece->bytes - i;
  for (int a = 0; a < width; ++a) {
    last[a] = (Vector){0};
    memcpy(&last[a], array[a] + i, rest);
  }
  for (int a = 0; a < width; ++a) {
    if (a != 1) last[a] += last[1];
  }
  if (zero) last[1] = (Vector){0};
  for (int a = 0; a < width; ++a) {
    if (a != 1 || zero) memcpy(array[a] + i, &last[a], rest);
  }
}

/* Asks for the beginnings of a piece's arrays: all of a tiny one, too short to wait for itself. */
static inline void prefetch_piece(const Piece* piece, int width) {
  for (int a = 0; a < width; ++a) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(piece->array[a] + 64 * line);
  }
}

static inline __attribute__((always_inline)) void move_chunk(const Floor* floor, int64_t chunk,
                                                             int width, int zero) {
  const int64_t last = floor->first[chunk + 1] - 1;
  for (int64_t p = floor->first[chunk]; p <= last; ++p) {
    if (p + kPiecesAhead <= last) prefetch_piece(&floor->pieces[p + kPiecesAhead], width);
    move_piece(&floor->pieces[p], &floor->pieces[p < last ? p + 1 : last], width, zero);
  }
}

/* With `zero` the gradient is written, too. */
void floor_move(const Floor* floor, int zero, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (floor->chunks > 1)
  for (int64_t c = 0; c < floor->chunks; ++c) {
    switch (floor->width * 2 + (zero != 0)) {
      /* One loop a width, its arrays in registers. */
#define FLOOR_CASE(width)           \
  case 2 * (width):                 \
    move_chunk(floor, c, width, 0); \
    break;                          \
  case 2 * (width) + 1:             \
    move_chunk(floor, c, width, 1); \
    break
      FLOOR_CASE(2);
      FLOOR_CASE(3);
      FLOOR_CASE(4);
      FLOOR_CASE(5);
      FLOOR_CASE(6);
      FLOOR_CASE(7);
      FLOOR_CASE(8);
#undef FLOOR_CASE
    }
  }
}

/* Reads the gradients alone, as the pass of a norm does. */
void floor_read(Floor* floor, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (floor->chunks > 1)
  for (int64_t c = 0; c < floor->chunks; ++c) {
    Vector sum = {0};
    const int64_t last = floor->first[c + 1] - 1;
    for (int64_t p = floor->first[c]; p <= last; ++p) {
      const char* grad = floor->pieces[p].array[1];
      const char* next = floor->pieces[p < last ? p + 1 : last].array[1];
      const int64_t whole = floor->pieces[p].bytes / kVector * kVector;
      int64_t i = 0;
      if (p + kPiecesAhead <= last) prefetch_piece(&floor->pieces[p + kPiecesAhead], 2);
      for (; i + 4 * kAhead < whole; i += kVector) {
        __builtin_prefetch(grad + i + 4 * kAhead, 0, 2);
        sum += *(const Vector*)(grad + i);
      }
      for (; i < whole; i += kVector) {
        __builtin_prefetch(next, 0, 2);
        next += kVector;
        sum += *(const Vector*)(grad + i);
      }
    }
    floor->sums[c] = sum[0] + sum[5];
  }
}
