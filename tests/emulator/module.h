#pragma once
#include <pybind11/pybind11.h>

// What module_backward.cpp and module_group.cpp add to the module.
void define_backward(pybind11::module_& m);
void define_group(pybind11::module_& m);
