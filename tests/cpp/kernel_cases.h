#pragma once

/// Random inputs for the kernel tests, the same on every run.

#include <cstdint>
#include <random>
#include <vector>

#include "base/aligned.h"
#include "base/half.h"
#include "kernels/kernels.h"

namespace elutq::testing {

inline std::vector<float> random_floats(int64_t count, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

inline std::vector<uint16_t> random_halves(int64_t count, uint32_t seed, float deviation = 1.0f) {
  std::vector<uint16_t> halves;
  for (const float value : random_floats(count, seed, deviation)) halves.push_back(float_to_half(value));
  return halves;
}

/// A random HLQ matrix with the memory its view points to. The bits past in_features are random too: no kernel may
/// depend on them.
struct HlqCase {
  HlqShape shape;
  std::vector<uint8_t> planes;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> zeros;
  std::vector<uint8_t> byte_scales;  ///< these three instead when parameters have 8 bits
  std::vector<int8_t> byte_zeros;
  std::vector<uint16_t> row_scales;

  HlqCase(const HlqShape& of, uint32_t seed) : shape(of) {
    std::mt19937 generator(seed);
    planes.resize(static_cast<size_t>(shape.bits * shape.out_features * ((shape.in_features + 7) / 8)));
    for (uint8_t& byte : planes) byte = static_cast<uint8_t>(generator());
    const int64_t groups = shape.out_features * shape.groups();
    if (shape.param_bits == 16) {
      scales = random_halves(groups * shape.bits, seed + 1, 0.02f);
      zeros = random_halves(groups, seed + 2, 0.02f);
      return;
    }
    for (int64_t i = 0; i < groups * shape.bits; ++i) byte_scales.push_back(static_cast<uint8_t>(generator()));
    for (int64_t i = 0; i < groups; ++i) byte_zeros.push_back(static_cast<int8_t>(generator()));
    row_scales = random_halves(shape.out_features, seed + 3, 0.0001f);
  }

  HlqView view() const {
    if (shape.param_bits == 16) return {shape, planes.data(), scales.data(), zeros.data()};
    return {shape, planes.data(), byte_scales.data(), byte_zeros.data(), row_scales.data()};
  }
};

/// Lookup tables with the memory their view points to.
struct Tables {
  AlignedBuffer<uint8_t> entries;
  std::vector<float> scales;
  std::vector<float> sums;

  explicit Tables(const HlqShape& shape)
      : entries(static_cast<size_t>(shape.table_bytes())),
        scales(static_cast<size_t>(shape.segments())),
        sums(static_cast<size_t>(shape.segments())) {}

  TableView view() { return {entries.data(), scales.data(), sums.data()}; }
};

}  // namespace elutq::testing
