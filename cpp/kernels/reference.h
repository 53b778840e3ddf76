#pragma once

/// The naive oracle: what every KernelTable must compute, written as plainly as possible. Slow on purpose, and built
/// without any instruction-set flags. Tests hold every instruction set against it.

#include <cstdint>

#include "kernels/kernels.h"

namespace elutq::reference {

/// Bit `plane` of weight (row, column), 0 or 1.
int bit(const HlqView& matrix, int plane, int64_t row, int64_t column);

/// Weight (row, column) as fp32: w = fma(scale[p], bit_p, w) from w = zero, p ascending.
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

}  // namespace elutq::reference
