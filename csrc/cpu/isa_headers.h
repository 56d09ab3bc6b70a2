// Everything that isa.inl needs, included before a target is set.
#pragma once
#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "kernels.h"
