// The search of one block of columns, a row per lane. Compiled once per instruction set, as group_search.cpp is.
#include "solver/column_search.h"

namespace elutq::ELUTQ_SOLVER_NAMESPACE {
namespace {

constexpr int kLanes = kColumnLanes;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

/// The rows of one vector: at most kLanes of them. Idle lanes are 0.
struct Tile {
  int64_t first;
  int64_t stride;
  int lanes;

  void load(const float* matrix, int64_t column, Floats& to) const {
    const float* from = matrix + column * stride + first;
    if (lanes == kLanes) {
      __builtin_memcpy(&to, from, sizeof(to));
    } else {
      to = Floats{};
      for (int l = 0; l < lanes; ++l) to[l] = from[l];
    }
  }

  void store(const Floats& from, float* matrix, int64_t column) const {
    float* to = matrix + column * stride + first;
    if (lanes == kLanes) {
      __builtin_memcpy(to, &from, sizeof(from));
    } else {
      for (int l = 0; l < lanes; ++l) to[l] = from[l];
    }
  }
};

template <int kLevels>
void search_tile(const ColumnSearch& search, const Tile& tile) {
  Floats levels[kLevels];
  Floats borders[kLevels] = {};  // borders[i] lies below levels[i]; the first is not used
  Ints level_codes[kLevels] = {};
  for (int i = 0; i < kLevels; ++i) {
    tile.load(search.levels, i, levels[i]);
    if (i > 0) borders[i] = (levels[i - 1] + levels[i]) * 0.5f;
    const uint8_t* from = search.level_codes + i * tile.stride + tile.first;
    for (int l = 0; l < tile.lanes; ++l) level_codes[i][l] = from[l];
  }
  const int64_t columns = search.columns;
  Floats pull[kColumnSearchColumns];
  for (int64_t k = 0; k < columns; ++k) tile.load(search.pull, k, pull[k]);
  for (int64_t j = 0; j < columns; ++j) {
    const float* row = search.matrix + j * columns;
    Floats base;
    tile.load(search.base, j, base);
    const Floats wanted = base + pull[j] * (1.0f / row[j]);
    Floats value = levels[0];
    Ints code = level_codes[0];
    for (int i = 1; i < kLevels; ++i) {
      const Ints above = wanted > borders[i];
      value = above ? levels[i] : value;
      code = above ? level_codes[i] : code;
    }
    const Floats error = base - value;
    tile.store(value, search.values, j);
    tile.store(error, search.errors, j);
    uint8_t* codes = search.codes + j * tile.stride + tile.first;
    for (int l = 0; l < tile.lanes; ++l) codes[l] = static_cast<uint8_t>(code[l]);
    for (int64_t k = 0; k < columns; ++k) pull[k] += error * row[k];
  }
  for (int64_t k = 0; k < columns; ++k) tile.store(pull[k], search.pull, k);
}

}  // namespace

void search_columns(const ColumnSearch& search) {
  for (int64_t first = 0; first < search.rows; first += kLanes) {
    const int64_t left = search.rows - first;
    const Tile tile{first, search.rows, static_cast<int>(left < kLanes ? left : kLanes)};
    if (search.bits == 1) search_tile<2>(search, tile);
    if (search.bits == 2) search_tile<4>(search, tile);
    if (search.bits == 3) search_tile<8>(search, tile);
    if (search.bits == 4) search_tile<16>(search, tile);
  }
}

}  // namespace elutq::ELUTQ_SOLVER_NAMESPACE
