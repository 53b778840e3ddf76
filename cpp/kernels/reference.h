#pragma once

/// The naive oracle: what every KernelTable must compute, written as plainly as possible. Slow on purpose, and built
/// without any instruction-set flags. Tests hold every instruction set against it.

#include <cstdint>

#include "kernels/kernels.h"

namespace elutq::reference {

/// Bit `plane` of weight (row, column), 0 or 1.
int bit(const HlqView& matrix, int plane, int64_t row, int64_t column);

/// Weight (row, column) as fp32: w = fma(scale[p], bit_p, w) from w = zero, p ascending, times the row's scale if there
/// is one.
float weight(const HlqView& matrix, int64_t row, int64_t column);

/// Sum of `count` values, or of their squares, in the canonical order: element i is added to lane i % 16 in order,
/// then lane i + 8 folds onto lane i, then i + 4, i + 2, i + 1.
float sum(const float* values, int64_t count);
float sum_of_products(const float* a, const float* b, int64_t count);

/// KernelTable::build_tables.
void build_tables(const float* x, int64_t in_features, int64_t segment_size, TableView tables);

/// Integer sum of one segment of one plane of a row: sum over its slots of (entry - 128).
int32_t segment_sum(const HlqView& matrix, const TableView& tables, int plane, int64_t row, int64_t segment);

/// KernelTable::matmul of all rows, bit for bit. y: [tokens][y_stride].
void matmul(const HlqView& matrix, const TableView* tables, int64_t tokens, float* y, int64_t y_stride);

/// The matrix product in double. x: [tokens][in_features], y: [tokens][out_features].
void matmul_double(const HlqView& matrix, const float* x, int64_t tokens, double* y);

/// e^x as every KernelTable computes it.
float exp(float x);

/// KernelTable::attention and merge_attention of one token and one head over all sections, bit for bit. queries: fp32
/// [head_dim]; keys, values: fp32 [positions][head_dim], what the token sees, the first of them at position `begin`;
/// key_scales, value_scales: [positions], of an int8 cache, else nullptr; out: [head_dim].
void attention(const float* query, const float* keys, const float* values, const float* key_scales,
               const float* value_scales, int64_t begin, int64_t positions, int64_t head_dim, float scale, float* out);

}  // namespace elutq::reference
