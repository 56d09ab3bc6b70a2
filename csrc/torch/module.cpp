#include <Python.h>

// An empty module: importing it runs the operator registrations in this library.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}
