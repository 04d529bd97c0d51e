// Everything that includes torch's or pybind11's headers, compiled as one unit: parsing these headers
// takes most of the time that one of the files below would take alone. setup.py compiles the files
// that are not listed here one by one.
#include "bindings.cpp"
#include "data/ring.cpp"
#include "plan/build.cpp"
#include "plan/device.cpp"
#include "plan/dtensor.cpp"
#include "plan/hyper.cpp"
#include "plan/memory.cpp"
#include "plan/pool.cpp"
#include "plan/step.cpp"
#include "plan/tensors.cpp"
#include "plan/triton.cpp"
#include "plan/walk.cpp"
