#pragma once

/// Hot functions take register values; they must vanish into their callers.
#define ELUTQ_INLINE [[gnu::always_inline]] inline
/// The same for a lambda, after its parameters.
#define ELUTQ_FLAT __attribute__((always_inline))

#include <cstdint>

namespace elutq {
namespace {

constexpr int kCacheLine = 64;

/// Loads a byte and forgets it, to fetch its cache line. Unlike a prefetch instruction it teaches the hardware
/// prefetchers, and unlike a vector load it waits in no queue of the vector unit.
ELUTQ_INLINE void touch(const uint8_t* byte) { static_cast<void>(*static_cast<const volatile uint8_t*>(byte)); }

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
