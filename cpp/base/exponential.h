#pragma once

#include <bit>
#include <cstdint>

namespace elutq {

/// exp(x) for x <= 0, to about 1e-7; 0 below -87.7. (Cephes' expf.) Branch-free, so that loops over it are vectorized;
/// `Float` may also be a vector of floats, and `Int` one of as many ints. Static, because the linker could keep the
/// copy of a build with instructions that the machine lacks.
template <typename Int = int32_t, typename Float = float>
static inline Float exp_nonpositive(Float x) {
  const Float lowest = Float{} - 88.1F;       // 2^-127, whose exponent bits are 0
  constexpr float kRound = 12582912.0F;       // 1.5 * 2^23: adding it rounds to an integer
  constexpr int32_t kRoundBits = 0x4B400000;  // of kRound; an integer is added to its bits, too
  x = x > lowest ? x : lowest;
  const Float rounded = x * 1.44269504F + kRound;
  const Float n = rounded - kRound;
  const Float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  Float p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  return p * std::bit_cast<Float>((std::bit_cast<Int>(rounded) - kRoundBits + 127) << 23);
}

}  // namespace elutq
