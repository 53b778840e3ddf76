#include "ops/rotary.h"

#include <cmath>

namespace elutq {

void rotary_angles(const std::vector<float>& inv_freq, float attention_factor, int64_t position, float* cos,
                   float* sin) {
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double angle = static_cast<float>(position) * inv_freq[i];
    cos[i] = static_cast<float>(std::cos(angle)) * attention_factor;
    sin[i] = static_cast<float>(std::sin(angle)) * attention_factor;
  }
}

}  // namespace elutq
