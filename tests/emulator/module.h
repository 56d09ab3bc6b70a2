#pragma once
#include <pybind11/pybind11.h>

// What module_backward.cpp adds to the module.
void define_backward(pybind11::module_& m);
