// One vector of LK_LANES floats, and exact conversions between the three dtypes.
constexpr int kLanes = LK_LANES;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef Vec UnalignedVec __attribute__((aligned(sizeof(float)), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline void fill_zero(float* p, int64_t count) { std::memset(p, 0, count * sizeof(float)); }

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "bit_cast keeps the size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Arithmetic selection: GCC leaves a branch, and no vector loop, where ?: would be read as control
// flow.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(Bf16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }
// Subnormals go through a subtraction of normal numbers, so flush-to-zero mode cannot lose them.
inline float to_float(Half v) {
  uint32_t shifted = (uint32_t{v.bits} & 0x7fff) << 13, exponent = shifted & (0x7c00u << 13);
  uint32_t normal = shifted + (uint32_t{127 - 15} << 23);
  uint32_t special = shifted + (uint32_t{255 - 31} << 23);
  uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23));
  uint32_t magnitude =
      select(exponent == 0x7c00u << 13, special, select(exponent == 0, subnormal, normal));
  return bit_cast<float>(magnitude | (uint32_t{v.bits} & 0x8000) << 16);
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, Bf16& out) {
  uint32_t bits = bit_cast<uint32_t>(v);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = static_cast<uint16_t>(select(nan, bits >> 16 | 0x40, rounded));
}
inline void from_float(float v, Half& out) {
  uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude - (uint32_t{127 - 15} << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low mantissa bits.
  uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t special =
      select(magnitude > 0x7f800000, 0x7e00, 0x7c00);  // NaN, or infinity by overflow
  uint32_t half = select(magnitude >= uint32_t{127 + 16} << 23, special,
                         select(magnitude < uint32_t{127 - 14} << 23, subnormal, normal));
  out.bits = static_cast<uint16_t>(half | sign);
}

// Calls f with a null pointer of the C++ type that dtype names.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(static_cast<float*>(nullptr));
    case Dtype::bf16: return f(static_cast<Bf16*>(nullptr));
    case Dtype::f16: return f(static_cast<Half*>(nullptr));
  }
}
