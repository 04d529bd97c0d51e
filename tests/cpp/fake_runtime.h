// A runtime library without a device, built as libcudart.so, where csrc/device/graph_runtime.cpp finds it: a
// stream is one queue of copies that are made when the test says so.
#pragma once

#include <cstddef>

extern "C" {
// Makes the copies that are waiting, up to so many; returns how many those were.
size_t fake_run(size_t most);
// Of the next copy or record; 0: none.
void fake_fail(int error);
// Errors that were left behind and not taken away.
int fake_errors();
}
