// AVX2 with FMA and F16C.

#include <immintrin.h>

#include <cstring>

#include "kernels/generic/compiler.h"
#include "kernels/isa/tables.h"

namespace elutq {
namespace {

struct Floats {
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
};

ELUTQ_INLINE __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
ELUTQ_INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

ELUTQ_INLINE Floats zeros() { return {}; }
ELUTQ_INLINE Floats splat(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
ELUTQ_INLINE Floats load(const void* from) {
  return {_mm256_castsi256_ps(load_256(from)), _mm256_castsi256_ps(load_256(static_cast<const uint8_t*>(from) + 32))};
}
ELUTQ_INLINE void store(Floats v, float* to) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + 8, v.high);
}
ELUTQ_INLINE Floats load_half(const void* from) {
  return {_mm256_cvtph_ps(load_128(from)), _mm256_cvtph_ps(load_128(static_cast<const uint8_t*>(from) + 16))};
}
ELUTQ_INLINE __m256 widen_bfloat16(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
ELUTQ_INLINE Floats load_bfloat16(const void* from) {
  return {widen_bfloat16(load_128(from)), widen_bfloat16(load_128(static_cast<const uint8_t*>(from) + 16))};
}
ELUTQ_INLINE Floats load_int8(const void* from) {
  const __m128i bytes = load_128(from);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
ELUTQ_INLINE Floats load_uint8(const void* from) {
  const __m128i bytes = load_128(from);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
ELUTQ_INLINE void store_half(Floats v, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}
ELUTQ_INLINE Floats splat_half(const void* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const __m256 v = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(half)));
  return {v, v};
}
ELUTQ_INLINE Floats from_bits(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), one)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high), one))};
}

ELUTQ_INLINE Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
ELUTQ_INLINE Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
ELUTQ_INLINE Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
ELUTQ_INLINE Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
ELUTQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
ELUTQ_INLINE Floats abs(Floats v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.low), _mm256_andnot_ps(sign, v.high)};
}
ELUTQ_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
ELUTQ_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

ELUTQ_INLINE float reduce_add(Floats v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
ELUTQ_INLINE float reduce_max(Floats v) {
  const __m256 eight = _mm256_max_ps(v.low, v.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
ELUTQ_INLINE Floats swap_neighbors(Floats v) {
  return {_mm256_permute_ps(v.low, 0b10'11'00'01), _mm256_permute_ps(v.high, 0b10'11'00'01)};
}
ELUTQ_INLINE Floats swap_pairs(Floats v) {
  return {_mm256_permute_ps(v.low, 0b01'00'11'10), _mm256_permute_ps(v.high, 0b01'00'11'10)};
}

ELUTQ_INLINE void store_low_bytes(Floats v, uint8_t* to) {
  // Byte 0 of each lane into the first or second four bytes of its half, then the halves together.
  const __m256i low = _mm256_and_si256(_mm256_castps_si256(v.low), _mm256_set1_epi32(255));
  const __m256i high = _mm256_and_si256(_mm256_castps_si256(v.high), _mm256_set1_epi32(255));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11'01'10'00);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
ELUTQ_INLINE __m256 scale_by_power(__m256 v, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
ELUTQ_INLINE Floats scale_by_power(Floats v, Floats n) {
  return {scale_by_power(v.low, n.low), scale_by_power(v.high, n.high)};
}
ELUTQ_INLINE float square_root(float f) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(f))); }

constexpr int kDenseRows = 2;
constexpr int kDenseTokens = 2;
constexpr int kAttentionRuns = 1;
constexpr int kMostTokens[] = {0, 4, 2, 2, 2};
constexpr int kManyTokens[] = {0, 12, 6, 3, 3};
constexpr bool kFetches = true;

// ---- Byte rows --------------------------------------------------------------------------------------------------

constexpr int kBytes = 32;
using Bytes = __m256i;

/// Sums of bytes, modulo 2^16. `all` adds the vectors as 16-bit numbers, so it holds even + 256 * odd; `odd` adds the
/// odd bytes alone. One shift and two additions per vector, and no shuffle, of which pshufb needs every slot.
struct Sums {
  __m256i all;
  __m256i odd;
};

constexpr int kRegisterSums = 4;

/// Even bytes hold rows 0..15 and odd bytes rows 16..31; of the sums, each half of a 32-bit lane is one of eight rows.
constexpr int byte_of_row(int row) { return row % 8 * 4 + row / 8 % 2 * 2 + row / 16; }

ELUTQ_INLINE Bytes load_bytes(const uint8_t* from) { return load_256(from); }
ELUTQ_INLINE void store_bytes(Bytes v, uint8_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
ELUTQ_INLINE Bytes load_table(const uint8_t* from) { return _mm256_broadcastsi128_si256(load_128(from)); }
ELUTQ_INLINE Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
ELUTQ_INLINE Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
ELUTQ_INLINE Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
ELUTQ_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
/// In this order: GCC would add what is added to each other first, and keep the sums of these in memory.
ELUTQ_INLINE void add(Sums& sums, Bytes v) {
  sums.all = _mm256_add_epi16(sums.all, v);
  sums.odd = _mm256_add_epi16(sums.odd, _mm256_srli_epi16(v, 8));
  asm("" : "+x"(sums.all), "+x"(sums.odd));
}
ELUTQ_INLINE Sums start_sums(int value) {
  return {_mm256_set1_epi16(static_cast<int16_t>(257 * value)), _mm256_set1_epi16(static_cast<int16_t>(value))};
}
/// A sum in the upper half of its lane is 2^16 times itself and needs no shuffle.
constexpr float kSumUnit = 0x1p16f;
ELUTQ_INLINE Floats to_floats(Sums sums, int part) {
  const __m256i even = _mm256_sub_epi16(sums.all, _mm256_slli_epi16(sums.odd, 8));
  const __m256i words = part == 0 ? even : sums.odd;
  return {_mm256_cvtepi32_ps(_mm256_slli_epi32(words, 16)),
          _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))};
}

}  // namespace
}  // namespace elutq

#include "kernels/generic/byte_rows.inl.h"
#include "kernels/generic/kernels.inl.h"

namespace elutq {
constinit const KernelTable kAvx2Kernels = make_table("avx2");
}  // namespace elutq
