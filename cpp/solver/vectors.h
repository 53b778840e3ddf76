#pragma once

/// Registers of the build that includes this, with element-wise operators. Only for files that are compiled once per
/// instruction set: types have internal linkage, so that no build can end up in another.

#include <cstdint>

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

/// Elements of a register: compilers take wider vectors apart, element by element.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

}  // namespace
}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
