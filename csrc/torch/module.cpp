#include <Python.h>

#define LK_TEXT_OF(name) #name
#define LK_TEXT(name) LK_TEXT_OF(name)
#define LK_INIT_OF(name) PyInit_##name
#define LK_INIT(name) LK_INIT_OF(name)

// An empty module: importing it runs the operator registrations in this library.
PyMODINIT_FUNC LK_INIT(TORCH_EXTENSION_NAME)() {
  constexpr const char* kName = LK_TEXT(TORCH_EXTENSION_NAME);  // _C in a build of setup.py
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, kName, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}
