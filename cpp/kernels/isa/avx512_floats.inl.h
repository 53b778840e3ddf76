// Floats of AVX-512 F, BW, VL and DQ: one register. Shared by avx512.cpp and avx512vbmi.cpp.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/generic/compiler.h"

namespace elutq {
namespace {

struct Floats {
  __m512 v = _mm512_setzero_ps();
};

ELUTQ_INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

ELUTQ_INLINE Floats zeros() { return {}; }
ELUTQ_INLINE Floats splat(float f) { return {_mm512_set1_ps(f)}; }
ELUTQ_INLINE Floats load(const void* from) { return {_mm512_loadu_ps(from)}; }
ELUTQ_INLINE void store(Floats a, float* to) { _mm512_storeu_ps(to, a.v); }
ELUTQ_INLINE Floats load_half(const void* from) { return {_mm512_cvtph_ps(load_256(from))}; }
ELUTQ_INLINE Floats load_bfloat16(const void* from) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(from)), 16))};
}
ELUTQ_INLINE Floats load_int8(const void* from) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
ELUTQ_INLINE Floats load_uint8(const void* from) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
ELUTQ_INLINE void store_half(Floats a, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
ELUTQ_INLINE Floats splat_half(const void* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half)))};
}
ELUTQ_INLINE Floats from_bits(uint32_t bits) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(1.0f))};
}

ELUTQ_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
ELUTQ_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
ELUTQ_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
ELUTQ_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
ELUTQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ELUTQ_INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
ELUTQ_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
ELUTQ_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }

ELUTQ_INLINE float reduce_add(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
ELUTQ_INLINE float reduce_max(Floats a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
ELUTQ_INLINE Floats swap_neighbors(Floats a) { return {_mm512_permute_ps(a.v, 0b10'11'00'01)}; }
ELUTQ_INLINE Floats swap_pairs(Floats a) { return {_mm512_permute_ps(a.v, 0b01'00'11'10)}; }

ELUTQ_INLINE void store_low_bytes(Floats a, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v)));
}
ELUTQ_INLINE Floats scale_by_power(Floats a, Floats n) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), power))};
}
ELUTQ_INLINE float square_root(float f) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(f))); }

constexpr int kDenseRows = 4;
constexpr int kDenseTokens = 4;
constexpr int kAttentionRuns = 4;

}  // namespace
}  // namespace elutq
