// The search of one block of columns, a row in each lane. Compiled once per instruction set, as group_search.cpp is.
#include "solver/column_search.h"

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

/// Rows in a register: compilers take wider vectors apart, element by element.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kRows = 64;  // side by side, so that a visit to a column reads some hundred bytes of it in a row
constexpr int kVectors = kRows / kLanes;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

/// Some rows, at most kRows of them. Idle lanes are 0.
struct Strip {
  int64_t first;
  int64_t stride;
  int rows;

  void load(const float* matrix, int64_t column, Floats (&to)[kVectors]) const {
    const float* from = matrix + column * stride + first;
    if (rows == kRows) {
      __builtin_memcpy(to, from, sizeof(to));
    } else {
      for (Floats& vector : to) vector = Floats{};
      for (int i = 0; i < rows; ++i) to[i / kLanes][i % kLanes] = from[i];
    }
  }

  void store(const Floats (&from)[kVectors], float* matrix, int64_t column) const {
    float* to = matrix + column * stride + first;
    if (rows == kRows) {
      __builtin_memcpy(to, from, sizeof(from));
    } else {
      for (int i = 0; i < rows; ++i) to[i] = from[i / kLanes][i % kLanes];
    }
  }
};

template <int kLevels>
void search_strip(const ColumnSearch& search, const Strip& strip) {
  Floats levels[kLevels][kVectors];
  Floats borders[kLevels][kVectors] = {};  // borders[i] lies below levels[i]; the first is not used
  Ints level_codes[kLevels][kVectors] = {};
  for (int i = 0; i < kLevels; ++i) {
    strip.load(search.levels, i, levels[i]);
    for (int v = 0; v < kVectors && i > 0; ++v) borders[i][v] = (levels[i - 1][v] + levels[i][v]) * 0.5f;
    const uint8_t* from = search.level_codes + i * strip.stride + strip.first;
    for (int row = 0; row < strip.rows; ++row) level_codes[i][row / kLanes][row % kLanes] = from[row];
  }
  const int64_t columns = search.columns;
  Floats pull[kColumnSearchColumns][kVectors];
  for (int64_t k = 0; k < columns; ++k) strip.load(search.pull, k, pull[k]);
  for (int64_t j = 0; j < columns; ++j) {
    const float* row = search.matrix + j * columns;
    Floats base[kVectors];
    Floats values[kVectors];
    Floats errors[kVectors];
    uint8_t codes[kRows];
    strip.load(search.base, j, base);
    for (int v = 0; v < kVectors; ++v) {
      const Floats wanted = base[v] + pull[j][v] * (1.0f / row[j]);
      Floats value = levels[0][v];
      Ints code = level_codes[0][v];
      for (int i = 1; i < kLevels; ++i) {
        const Ints above = wanted > borders[i][v];
        value = above ? levels[i][v] : value;
        code = above ? level_codes[i][v] : code;
      }
      values[v] = value;
      errors[v] = base[v] - value;
      for (int l = 0; l < kLanes; ++l) codes[v * kLanes + l] = static_cast<uint8_t>(code[l]);
    }
    strip.store(values, search.values, j);
    strip.store(errors, search.errors, j);
    __builtin_memcpy(search.codes + j * strip.stride + strip.first, codes, strip.rows);
    for (int64_t k = 0; k < columns; ++k) {
      for (int v = 0; v < kVectors; ++v) pull[k][v] += errors[v] * row[k];
    }
  }
  for (int64_t k = 0; k < columns; ++k) strip.store(pull[k], search.pull, k);
}

}  // namespace

void search_columns(const ColumnSearch& search) {
  for (int64_t first = 0; first < search.rows; first += kRows) {
    const int64_t left = search.rows - first;
    const Strip strip{first, search.rows, static_cast<int>(left < kRows ? left : kRows)};
    if (search.bits == 1) search_strip<2>(search, strip);
    if (search.bits == 2) search_strip<4>(search, strip);
    if (search.bits == 3) search_strip<8>(search, strip);
    if (search.bits == 4) search_strip<16>(search, strip);
  }
}

}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
