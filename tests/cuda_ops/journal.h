// What the operators ask of a device, a line each.
#pragma once
#include <sstream>

std::ostringstream& journal();
