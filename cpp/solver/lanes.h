#pragma once

/// One value for each of sixteen groups, with element-wise operators. Only for group_search.cpp, which is compiled once
/// per instruction set: everything here has internal linkage, so that no build can end up in another.

#include <cstdint>

#include "solver/group_search.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

constexpr int kLanes = kSearchLanes;

/// Lanes of one vector: as many as there are doubles in a register. Floats and ints use vectors of the same number of
/// lanes, so that conversions stay within one vector.
#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kParts = kLanes / kWidth;

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kWidth * sizeof(T))));
  Vector part[kParts];

  Lanes() = default;
  Lanes(T value) {  // NOLINT: a scalar stands for itself in every lane
    for (Vector& v : part) v = value - Vector{};
  }
  // Vector by vector: compilers copy the whole array in wider pieces, which then wait for the narrower stores.
  Lanes(const Lanes& other) { *this = other; }
  Lanes& operator=(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] = other.part[i];
    return *this;
  }
  static Lanes load(const T* from) {
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) __builtin_memcpy(&lanes.part[i], from + i * kWidth, sizeof(Vector));
    return lanes;
  }
  void store(T* to) const {
    for (int i = 0; i < kParts; ++i) __builtin_memcpy(to + i * kWidth, &part[i], sizeof(Vector));
  }
  T operator[](int lane) const { return part[lane / kWidth][lane % kWidth]; }
  void set(int lane, T value) { part[lane / kWidth][lane % kWidth] = value; }
};

using Floats = Lanes<float>;
using Doubles = Lanes<double>;
using Ints = Lanes<int32_t>;
using Masks = Lanes<int64_t>;  ///< of Doubles: -1 where true, 0 where false

#define ELUTQ_LANES_OPERATOR(op)                                              \
  template <typename T>                                                       \
  inline Lanes<T> operator op(const Lanes<T>& a, const Lanes<T>& b) {         \
    Lanes<T> result;                                                          \
    for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] op b.part[i]; \
    return result;                                                            \
  }                                                                           \
  template <typename T>                                                       \
  inline Lanes<T> operator op(const Lanes<T>& a, T b) {                       \
    return a op Lanes<T>(b);                                                  \
  }                                                                           \
  template <typename T>                                                       \
  inline Lanes<T> operator op(T a, const Lanes<T>& b) {                       \
    return Lanes<T>(a) op b;                                                  \
  }                                                                           \
  template <typename T>                                                       \
  inline Lanes<T>& operator op## = (Lanes<T> & a, const Lanes<T>& b) {        \
    return a = a op b;                                                        \
  }
ELUTQ_LANES_OPERATOR(+)
ELUTQ_LANES_OPERATOR(-)
ELUTQ_LANES_OPERATOR(*)
ELUTQ_LANES_OPERATOR(/)
#undef ELUTQ_LANES_OPERATOR

inline Masks operator<(const Doubles& a, const Doubles& b) {
  Masks result;
  for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] < b.part[i];
  return result;
}

inline Doubles select(const Masks& mask, const Doubles& yes, const Doubles& no) {
  Doubles result;
  for (int i = 0; i < kParts; ++i) result.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return result;
}

/// `amount` in the lanes where a <= b, 0 elsewhere.
inline Ints where_at_most(const Floats& a, const Floats& b, int32_t amount) {
  Ints result;
  for (int i = 0; i < kParts; ++i) result.part[i] = (a.part[i] <= b.part[i]) & amount;
  return result;
}

template <typename T>
inline Lanes<T> min(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> result;
  for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return result;
}

template <typename T>
inline Lanes<T> max(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> result;
  for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] < b.part[i] ? b.part[i] : a.part[i];
  return result;
}

inline Doubles sqrt(const Doubles& x) {
  Doubles result;
  for (int l = 0; l < kLanes; ++l) result.set(l, __builtin_sqrt(x[l]));
  return result;
}

template <typename To, typename From>
inline Lanes<To> convert(const Lanes<From>& from) {
  Lanes<To> result;
  for (int i = 0; i < kParts; ++i) result.part[i] = __builtin_convertvector(from.part[i], typename Lanes<To>::Vector);
  return result;
}

/// base[index] in each lane. The masked forms are used because the plain ones warn of an uninitialized operand (GCC
/// 12).
inline Floats gather(const float* base, const Ints& index) {
  Floats result;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    result.part[i] = _mm256_i32gather_ps(base, __m256i(index.part[i]), 4);
#elif defined(__AVX2__)
    result.part[i] = _mm_i32gather_ps(base, __m128i(index.part[i]), 4);
#else
    for (int l = 0; l < kWidth; ++l) result.part[i][l] = base[index.part[i][l]];
#endif
  }
  return result;
}

inline Doubles gather(const double* base, const Ints& index) {
  Doubles result;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256d all = _mm256_castsi256_pd(_mm256_set1_epi64x(-1));
#endif
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    result.part[i] = _mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, __m256i(index.part[i]), base, 8);
#elif defined(__AVX2__)
    result.part[i] = _mm256_mask_i32gather_pd(_mm256_setzero_pd(), base, __m128i(index.part[i]), all, 8);
#else
    for (int l = 0; l < kWidth; ++l) result.part[i][l] = base[index.part[i][l]];
#endif
  }
  return result;
}

}  // namespace
}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
