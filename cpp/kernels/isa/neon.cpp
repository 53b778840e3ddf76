// Advanced SIMD of armv8-a: every 64-bit ARM.

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/generic/compiler.h"
#include "kernels/isa/tables.h"

namespace elutq {
namespace {

// Named members, not an array, which GCC would keep in memory.
struct Floats {
  float32x4_t a = {};
  float32x4_t b = {};
  float32x4_t c = {};
  float32x4_t d = {};
};

/// f on each register of the arguments.
template <typename F, typename... V>
ELUTQ_INLINE Floats each(F f, const V&... v) {
  return {f(v.a...), f(v.b...), f(v.c...), f(v.d...)};
}

/// Registers are loaded as bytes: those have no alignment.
ELUTQ_INLINE uint8x16_t load_128(const void* from, int64_t offset) {
  return vld1q_u8(static_cast<const uint8_t*>(from) + offset);
}
ELUTQ_INLINE float32x4_t load_four(const void* from, int64_t offset) {
  return vreinterpretq_f32_u8(load_128(from, offset));
}

ELUTQ_INLINE Floats zeros() { return {}; }
ELUTQ_INLINE Floats splat(float f) {
  const float32x4_t v = vdupq_n_f32(f);
  return {v, v, v, v};
}
ELUTQ_INLINE Floats load(const void* from) {
  return {load_four(from, 0), load_four(from, 16), load_four(from, 32), load_four(from, 48)};
}
ELUTQ_INLINE void store(Floats v, float* to) {
  vst1q_f32(to, v.a);
  vst1q_f32(to + 4, v.b);
  vst1q_f32(to + 8, v.c);
  vst1q_f32(to + 12, v.d);
}
ELUTQ_INLINE Floats load_half(const void* from) {
  const float16x8_t low = vreinterpretq_f16_u8(load_128(from, 0));
  const float16x8_t high = vreinterpretq_f16_u8(load_128(from, 16));
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
          vcvt_high_f32_f16(high)};
}
ELUTQ_INLINE Floats load_bfloat16(const void* from) {
  const uint16x8_t low = vreinterpretq_u16_u8(load_128(from, 0));
  const uint16x8_t high = vreinterpretq_u16_u8(load_128(from, 16));
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
}
ELUTQ_INLINE Floats load_int8(const void* from) {
  const int8x16_t bytes = vreinterpretq_s8_u8(load_128(from, 0));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
  const int16x8_t high = vmovl_high_s8(bytes);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
ELUTQ_INLINE Floats load_uint8(const void* from) {
  const uint8x16_t bytes = load_128(from, 0);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes));
  const uint16x8_t high = vmovl_high_u8(bytes);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
          vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))};
}
ELUTQ_INLINE void store_half(Floats v, uint16_t* to) {
  vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b)));
  vst1q_u16(to + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.c), v.d)));
}
ELUTQ_INLINE Floats splat_half(const void* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const float32x4_t v = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
  return {v, v, v, v};
}
/// Bits shift .. shift + 3.
ELUTQ_INLINE float32x4_t four_bits(uint32_t bits, int shift) {
  constexpr uint32x4_t kLaneBit = {1, 2, 4, 8};
  const uint32x4_t set = vtstq_u32(vdupq_n_u32(bits >> shift), kLaneBit);
  return vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(vdupq_n_f32(1.0f))));
}
ELUTQ_INLINE Floats from_bits(uint32_t bits) {
  return {four_bits(bits, 0), four_bits(bits, 4), four_bits(bits, 8), four_bits(bits, 12)};
}

ELUTQ_INLINE Floats operator+(Floats x, Floats y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
ELUTQ_INLINE Floats operator-(Floats x, Floats y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
ELUTQ_INLINE Floats operator*(Floats x, Floats y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
ELUTQ_INLINE Floats operator/(Floats x, Floats y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
ELUTQ_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return each([](auto p, auto q, auto r) ELUTQ_FLAT { return vfmaq_f32(r, p, q); }, x, y, z);
}
ELUTQ_INLINE Floats abs(Floats v) {
  return each([](auto p) ELUTQ_FLAT { return vabsq_f32(p); }, v);
}

// Not fmax and fmin, which differ from the other instruction sets in NaN and in the sign of zero.
ELUTQ_INLINE float32x4_t max(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
ELUTQ_INLINE float32x4_t min(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
ELUTQ_INLINE Floats max(Floats x, Floats y) { return {max(x.a, y.a), max(x.b, y.b), max(x.c, y.c), max(x.d, y.d)}; }
ELUTQ_INLINE Floats min(Floats x, Floats y) { return {min(x.a, y.a), min(x.b, y.b), min(x.c, y.c), min(x.d, y.d)}; }

ELUTQ_INLINE float reduce_add(Floats v) {
  const float32x4_t four = (v.a + v.c) + (v.b + v.d);
  const float32x2_t two = vget_low_f32(four) + vget_high_f32(four);
  return two[0] + two[1];
}
ELUTQ_INLINE float reduce_max(Floats v) {
  const float32x4_t four = max(max(v.a, v.c), max(v.b, v.d));
  const float32x4_t two = max(four, vextq_f32(four, four, 2));
  return two[0] > two[1] ? two[0] : two[1];
}
ELUTQ_INLINE Floats swap_neighbors(Floats v) {
  return each([](auto p) ELUTQ_FLAT { return vrev64q_f32(p); }, v);
}
ELUTQ_INLINE Floats swap_pairs(Floats v) {
  return each([](auto p) ELUTQ_FLAT { return vextq_f32(p, p, 2); }, v);
}

ELUTQ_INLINE void store_low_bytes(Floats v, uint8_t* to) {
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_f32(v.a), vreinterpretq_u16_f32(v.b));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_f32(v.c), vreinterpretq_u16_f32(v.d));
  vst1q_u8(to, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
}
ELUTQ_INLINE Floats scale_by_power(Floats v, Floats n) {
  return each(
      [](auto p, auto q) ELUTQ_FLAT {
        const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(q), 23);
        return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p), power));
      },
      v, n);
}
ELUTQ_INLINE float square_root(float f) { return __builtin_sqrtf(f); }

constexpr int kDenseRows = 2;
constexpr int kDenseTokens = 2;
constexpr int kAttentionRuns = 1;
constexpr int kMostTokens[] = {0, 4, 4, 2, 2};
constexpr int kManyTokens[] = {0, 0, 0, 0, 0};
constexpr bool kFetches = false;

// ---- Byte rows --------------------------------------------------------------------------------------------------

constexpr int kBytes = 16;
using Bytes = uint8x16_t;

/// Sums of bytes 0..7 and 8..15, modulo 2^16.
struct Sums {
  uint16x8_t low;
  uint16x8_t high;
};

constexpr int kRegisterSums = 8;

constexpr int byte_of_row(int row) { return row; }

ELUTQ_INLINE Bytes load_bytes(const uint8_t* from) { return vld1q_u8(from); }
[[maybe_unused]] ELUTQ_INLINE void store_bytes(Bytes v, uint8_t* to) { vst1q_u8(to, v); }
ELUTQ_INLINE Bytes load_table(const uint8_t* from) { return vld1q_u8(from); }
ELUTQ_INLINE Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
ELUTQ_INLINE Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
ELUTQ_INLINE Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
ELUTQ_INLINE Bytes add_bytes(Bytes a, Bytes b) { return vaddq_u8(a, b); }
ELUTQ_INLINE void add(Sums& sums, Bytes v) {
  sums.low = vaddw_u8(sums.low, vget_low_u8(v));
  sums.high = vaddw_high_u8(sums.high, v);
}
ELUTQ_INLINE Sums start_sums(int value) {
  const uint16x8_t v = vdupq_n_u16(static_cast<uint16_t>(value));
  return {v, v};
}
constexpr float kSumUnit = 1.0f;
ELUTQ_INLINE Floats to_floats(Sums sums, int /*part*/) {
  const int16x8_t low = vreinterpretq_s16_u16(sums.low);
  const int16x8_t high = vreinterpretq_s16_u16(sums.high);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}

}  // namespace
}  // namespace elutq

#include "kernels/generic/byte_rows.inl.h"
#include "kernels/generic/kernels.inl.h"

namespace elutq {
constinit const KernelTable kNeonKernels = make_table("neon");
}  // namespace elutq
