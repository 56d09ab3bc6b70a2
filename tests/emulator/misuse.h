#pragma once
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace emu {

// Names of the kernels of misuse.cpp, and the regular expression that each one's report matches.
std::vector<std::pair<std::string, std::string>> misuse_cases();
// Throws Error with the report.
void run_misuse(const std::string& name, bool wrong, Options options);

}  // namespace emu
