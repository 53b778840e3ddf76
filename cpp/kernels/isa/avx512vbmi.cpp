// AVX-512 with VBMI and VNNI: Ice Lake, Zen 4 and later.

#include "kernels/isa/avx512_floats.inl.h"
#include "kernels/isa/tables.h"

namespace elutq {
namespace {

constexpr int kMostTokens[] = {0, 8, 6, 4, 4};
constexpr int kManyTokens[] = {0, 0, 0, 0, 0};
constexpr bool kFetches = true;

using Bytes = __m512i;
struct Sums {
  __m512i of;
};

/// (v & 15) | j << 4 in byte j of every four: one ternary-logic instruction.
ELUTQ_INLINE Bytes low_index(Bytes v) {
  const __m512i table = _mm512_set1_epi32(0x30201000);
  return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8(15), table, 0xea);
}
ELUTQ_INLINE Bytes high_index(Bytes v) { return low_index(_mm512_srli_epi16(v, 4)); }
ELUTQ_INLINE Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
ELUTQ_INLINE Bytes load_tables(const uint8_t* from) {
  Bytes tables = load_bytes(from);
  asm("" : "+v"(tables));  // loaded once, not by every lookup: a core loads one such register per cycle
  return tables;
}
ELUTQ_INLINE Bytes lookup(Bytes tables, Bytes index) { return _mm512_permutexvar_epi8(index, tables); }
ELUTQ_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
/// Not the intrinsic, around which GCC copies the sums of a loop: 1% slower at 2 bits, 7% at 4.
ELUTQ_INLINE void add(Sums& sums, Bytes v) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.of) : "v"(v), "v"(_mm512_set1_epi8(1)));
}
ELUTQ_INLINE Sums start_sums(int value) { return {_mm512_set1_epi32(value)}; }
constexpr float kSumUnit = 1.0f;
ELUTQ_INLINE Floats to_floats(Sums sums, int /*part*/) { return {_mm512_cvtepi32_ps(sums.of)}; }

}  // namespace
}  // namespace elutq

#include "kernels/generic/quad_slots.inl.h"
//
#include "kernels/generic/kernels.inl.h"

namespace elutq {
constinit const KernelTable kAvx512VbmiKernels = make_table("avx512vbmi");
}  // namespace elutq
