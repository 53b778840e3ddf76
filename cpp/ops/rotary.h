#pragma once

#include <cstdint>
#include <vector>

namespace elutq {

/// Cosines and sines of one position, as transformers computes them: the angle is rounded to fp32, then the cosine is
/// taken in fp64 and rounded, then scaled.
/// inv_freq: [head_dim / 2]; cos, sin: [head_dim / 2].
void rotary_angles(const std::vector<float>& inv_freq, float attention_factor, int64_t position, float* cos,
                   float* sin);

}  // namespace elutq
