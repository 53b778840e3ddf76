// Plain C++ for any machine: the promises of the other instruction sets in their slowest form.

#include <cmath>
#include <cstring>

#include "base/half.h"
#include "kernels/generic/compiler.h"
#include "kernels/isa/tables.h"

namespace elutq {
namespace {

struct Floats {
  float lane[16] = {};
};

template <typename F>
ELUTQ_INLINE Floats per_lane(F f) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
  return r;
}

inline Floats zeros() { return {}; }
inline Floats splat(float f) {
  return per_lane([f](int) { return f; });
}
inline Floats load(const void* from) {
  Floats r;
  std::memcpy(r.lane, from, sizeof r.lane);
  return r;
}
inline void store(const Floats& v, void* to) { std::memcpy(to, v.lane, sizeof v.lane); }

inline uint16_t half_at(const void* from, int i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const uint8_t*>(from) + 2 * i, 2);
  return bits;
}
inline Floats load_half(const void* from) {
  return per_lane([from](int i) { return half_to_float(half_at(from, i)); });
}
inline Floats load_bfloat16(const void* from) {
  return per_lane([from](int i) { return bfloat16_to_float(half_at(from, i)); });
}
inline Floats load_int8(const void* from) {
  return per_lane([from](int i) { return static_cast<float>(static_cast<const int8_t*>(from)[i]); });
}
inline Floats load_uint8(const void* from) {
  return per_lane([from](int i) { return static_cast<float>(static_cast<const uint8_t*>(from)[i]); });
}
inline void store_half(const Floats& v, uint16_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = float_to_half(v.lane[i]);
}
inline Floats splat_half(const void* from) { return splat(half_to_float(half_at(from, 0))); }
inline Floats from_bits(uint32_t bits) {
  return per_lane([bits](int i) { return static_cast<float>(bits >> i & 1); });
}

inline Floats operator+(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats operator-(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Floats operator*(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats operator/(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return per_lane([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Floats abs(const Floats& v) {
  return per_lane([&](int i) { return __builtin_fabsf(v.lane[i]); });
}
inline Floats max(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats min(const Floats& a, const Floats& b) {
  return per_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

inline float reduce_add(Floats v) {
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  }
  return v.lane[0];
}
inline float reduce_max(Floats v) {
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] = v.lane[i] > v.lane[i + width] ? v.lane[i] : v.lane[i + width];
  }
  return v.lane[0];
}
inline Floats swap_neighbors(const Floats& v) {
  return per_lane([&](int i) { return v.lane[i ^ 1]; });
}
inline Floats swap_pairs(const Floats& v) {
  return per_lane([&](int i) { return v.lane[i ^ 2]; });
}

inline void store_low_bytes(const Floats& v, uint8_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, v.lane[i]));
}
inline Floats scale_by_power(const Floats& v, const Floats& n) {
  return per_lane([&](int i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, v.lane[i]) + (__builtin_bit_cast(uint32_t, n.lane[i]) << 23);
    return __builtin_bit_cast(float, bits);
  });
}
inline float square_root(float f) { return std::sqrt(f); }

constexpr int kDenseRows = 4;
constexpr int kDenseTokens = 1;
constexpr int kAttentionRuns = 1;
constexpr int kMostTokens[] = {0, 1, 1, 1, 1};
constexpr int kManyTokens[] = {0, 0, 0, 0, 0};
constexpr bool kFetches = false;

constexpr int kBytes = 16;
struct Bytes {
  uint8_t byte[kBytes];
};
struct Sums {
  int32_t of[kBytes];
};

constexpr int kRegisterSums = 1;

constexpr int byte_of_row(int row) { return row; }
inline Bytes load_bytes(const uint8_t* from) {
  Bytes r;
  std::memcpy(r.byte, from, kBytes);
  return r;
}
[[maybe_unused]] inline void store_bytes(const Bytes& v, uint8_t* to) { std::memcpy(to, v.byte, kBytes); }
inline Bytes load_table(const uint8_t* from) { return load_bytes(from); }
inline Bytes low_nibbles(Bytes v) {
  for (uint8_t& byte : v.byte) byte &= 15;
  return v;
}
inline Bytes high_nibbles(Bytes v) {
  for (uint8_t& byte : v.byte) byte = static_cast<uint8_t>(byte >> 4);
  return v;
}
inline Bytes lookup(const Bytes& table, Bytes index) {
  for (uint8_t& byte : index.byte) byte = table.byte[byte];
  return index;
}
inline Bytes add_bytes(Bytes a, const Bytes& b) {
  for (int i = 0; i < kBytes; ++i) a.byte[i] = static_cast<uint8_t>(a.byte[i] + b.byte[i]);
  return a;
}
inline void add(Sums& sums, const Bytes& v) {
  for (int i = 0; i < kBytes; ++i) sums.of[i] += v.byte[i];
}
inline Sums start_sums(int value) {
  Sums r;
  for (int32_t& sum : r.of) sum = value;
  return r;
}
constexpr float kSumUnit = 1.0f;
inline Floats to_floats(const Sums& sums, int /*part*/) {
  return per_lane([&](int i) { return static_cast<float>(sums.of[i]); });
}

}  // namespace
}  // namespace elutq

#include "kernels/generic/byte_rows.inl.h"
#include "kernels/generic/kernels.inl.h"

namespace elutq {
constinit const KernelTable kScalarKernels = make_table("scalar");
}  // namespace elutq
