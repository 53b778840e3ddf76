#pragma once

/// Hot functions take register values; they must vanish into their callers.
#define ELUTQ_INLINE [[gnu::always_inline]] inline
/// The same for a lambda, after its parameters.
#define ELUTQ_FLAT __attribute__((always_inline))

#include <cstdint>

namespace elutq {
namespace {

constexpr int kCacheLine = 64;

template <int value>
struct Constant {
  constexpr operator int() const { return value; }
};

/// body(Constant<begin>) .. body(Constant<end - 1>). Unlike an unrolled loop, the indices are constants from the start,
/// so that small arrays of registers stay in registers.
template <int end, int begin = 0, typename Body>
ELUTQ_INLINE void unroll(const Body& body) {
  if constexpr (begin < end) {
    body(Constant<begin>{});
    unroll<end, begin + 1>(body);
  }
}

}  // namespace
}  // namespace elutq
