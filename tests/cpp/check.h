// The C++ tests' one tool: CHECK(condition, message) counts a failure, prints it, and goes on.
#pragma once

#include <cstdio>
#include <string>

namespace check {

inline long failures = 0;

constexpr long kMostPrinted = 200;

// Counts a failure; whether its message is to be printed.
inline bool fail() { return ++failures <= kMostPrinted; }

inline void print(const char* file, int line, const char* what, const std::string& message) {
  std::fprintf(stderr, "%s:%d: CHECK(%s) failed: %s\n", file, line, what, message.c_str());
}

// The exit status of main.
inline int finish(const char* name, long checked) {
  std::fprintf(stderr, "%s: %ld checks, %ld failures\n", name, checked, failures);
  return failures == 0 && checked > 0 ? 0 : 1;
}

}  // namespace check

// The message is built only where it is printed: exhaustive tests check millions of values.
#define CHECK(condition, message)                            \
  do {                                                       \
    if (!(condition) && check::fail()) {                     \
      check::print(__FILE__, __LINE__, #condition, message); \
    }                                                        \
  } while (false)
