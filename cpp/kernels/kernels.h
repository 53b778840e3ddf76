#pragma once

/// The contract between the engine and the instruction sets.
///
/// Every instruction set fills one KernelTable; nothing above this file knows which one runs. The algorithms live in
/// generic/*.inl.h, written once against a small Simd type; isa/<name>.cpp defines that type, includes the algorithms
/// in its own namespace and fills the table. reference.h states what every entry must compute, naively.
///
/// HOW AN HLQ MATRIX IS MULTIPLIED
///
///     w[n][k] = zero[n][g] + sum_p scale[n][g][p] * bit_p[n][k]           g = k / group_size
///
/// Write a bit as (1 + s)/2 with s = +1 or -1. Then, with mid = zero + sum_p scale[p] / 2,
///
///     y[n] = sum_g ( mid[n][g] * sum_k x[k]  +  sum_p scale[n][g][p] * sum_k s_p[n][k] * x[k] / 2 )
///
/// The inner sum runs over slots of four columns. A slot has only 16 possible values, one per pattern of its four bits:
///
///     entry[slot][i] = (±x[4*slot] ±x[4*slot+1] ±x[4*slot+2] ±x[4*slot+3]) / 2     + where bit j of i is set
///
/// They are computed once per token, added as (±x0 ±x1) + (±x2 ±x3), rounded to int8 under one scale per SEGMENT, and
/// every row then looks its own four bits up. A segment is `segment_size` consecutive columns: a whole group, or 128
/// columns of a longer group, the last one possibly shorter. Integers add exactly, so the sum of a segment is the same
/// on every instruction set, bit for bit; and the floating-point steps that follow are fixed, fused multiply-adds
/// included:
///
///     for each segment, in order, with g its group:
///       u   = scale[0] * float(isum[0]);  for p = 1 .. bits-1:  u   = fma(scale[p], float(isum[p]), u)
///       acc = fma(u, table_scale[segment], acc)
///       mid = zero;                       for p = 0 .. bits-1:  mid = fma(0.5, scale[p], mid)
///       acc = fma(mid, table_sum[segment], acc)
///
/// Therefore one output depends on its own row and its own token alone: not on the batch, the number of threads, the
/// split of the rows or the instruction set. The other entries keep the same promise: wherever they add floats, they
/// add them in 16 lanes (element i to lane i % 16, in order) and then fold lane i + 8 onto i, i + 4, i + 2, i + 1. So a
/// whole forward pass gives the same bits on every machine.

#include <cstdint>
#include <string_view>
#include <vector>

namespace elutq {

/// Columns whose weights one table lookup covers.
inline constexpr int kSlotColumns = 4;
/// Rows are padded with zero columns to a multiple of this inside packed matrices and tables.
inline constexpr int64_t kColumnPadding = 32;
/// Most columns that share one table scale.
inline constexpr int64_t kMaxSegment = 128;
inline constexpr int kMaxBits = 4;

/// Dimensions of an HLQ matrix. group_size is in columns: a multiple of 32, or in_features for a whole-row group.
/// The members are always inlined because objects of every instruction set use them: an out-of-line copy that the
/// linker took from an AVX-512 object would crash a smaller machine.
struct HlqShape {
  int64_t out_features = 0;
  int64_t in_features = 0;
  int bits = 0;
  int64_t group_size = 0;

  [[gnu::always_inline]] int64_t groups() const { return (in_features + group_size - 1) / group_size; }
  [[gnu::always_inline]] int64_t segment_size() const { return group_size < kMaxSegment ? group_size : kMaxSegment; }
  [[gnu::always_inline]] int64_t segments() const { return (in_features + segment_size() - 1) / segment_size(); }
  [[gnu::always_inline]] int64_t padded_in() const {
    return (in_features + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
  }
  [[gnu::always_inline]] int64_t slots() const { return padded_in() / kSlotColumns; }
};

/// An HLQ matrix as it lies on disk (docs/format.md).
struct HlqView {
  HlqShape shape;
  const uint8_t* planes = nullptr;   ///< [bits][out_features][ceil(in_features / 8)]
  const uint16_t* scales = nullptr;  ///< fp16 [out_features][groups][bits]
  const uint16_t* zeros = nullptr;   ///< fp16 [out_features][groups]
};

/// Lookup tables of one token for matrices of one in_features and segment_size; the same on every instruction set.
/// Memory is owned by the caller; entries must be aligned to 64 bytes.
struct TableView {
  uint8_t* entries = nullptr;  ///< [slots][16]: 128 + round(entry * (127 / largest)), half to even, in 1..255
  float* scales = nullptr;     ///< [segments]: largest / 127 with largest = max |entry|; 0 when that is below 2^-100
  float* sums = nullptr;       ///< [segments]: sum of the segment's activations
};

enum class DenseType { kFloat32, kFloat16, kBFloat16 };

/// A run of consecutive positions of one head of one sequence's cache, fp16.
struct KvSpan {
  const uint16_t* keys = nullptr;    ///< [length][head_dim]
  const uint16_t* values = nullptr;  ///< [length][head_dim]
  int64_t length = 0;
};

struct KernelTable {
  std::string_view isa;  ///< "scalar", "avx2", "avx512", "avx512vbmi", "neon"
  /// Rows are packed in tiles of this many. Row ranges given to pack and matmul begin at a multiple of it and end at
  /// a multiple of it or at out_features.
  int64_t row_tile;

  // ---- HLQ matrices --------------------------------------------------------------------------------------------

  /// Bytes of the packed matrix, last partial tile included. Packed memory must be aligned to 64 bytes.
  int64_t (*packed_bytes)(const HlqShape& shape);
  /// Repacks rows [row_begin, row_end). Disjoint row ranges may be packed concurrently.
  void (*pack)(const HlqView& matrix, int64_t row_begin, int64_t row_end, uint8_t* packed);
  /// Dequantizes one row to fp32 [in_features]: w = fma(scale[p], bit_p, w) from w = zero, p ascending.
  void (*unpack_row)(const HlqShape& shape, const uint8_t* packed, int64_t row, float* weights);
  /// Tables of one token. x: fp32 [in_features]; columns past in_features count as 0.
  void (*build_tables)(const float* x, int64_t in_features, int64_t segment_size, TableView tables);
  /// y[t * y_stride + n] = sum_k w[n][k] x[t][k] for n in [row_begin, row_end), t in [0, tokens), from int8 tables.
  void (*matmul)(const HlqShape& shape, const uint8_t* packed, const TableView* tables, int64_t tokens,
                 int64_t row_begin, int64_t row_end, float* y, int64_t y_stride);
  /// The same from fp32 activations, table rounding off: x[t * x_stride + k].
  void (*matmul_exact)(const HlqShape& shape, const uint8_t* packed, const float* x, int64_t x_stride, int64_t tokens,
                       int64_t row_begin, int64_t row_end, float* y, int64_t y_stride);

  // ---- 16- and 32-bit matrices, row-major [out_features][in_features], any alignment -------------------------------

  void (*matmul_dense)(DenseType type, const void* weights, int64_t in_features, const float* x, int64_t x_stride,
                       int64_t tokens, int64_t row_begin, int64_t row_end, float* y, int64_t y_stride);
  /// count values of `type` -> fp32.
  void (*to_float)(DenseType type, const void* from, int64_t count, float* to);

  // ---- Vectors ------------------------------------------------------------------------------------------------

  /// fp32 -> fp16, round to nearest even.
  void (*to_half)(const float* from, int64_t count, uint16_t* to);
  /// y = x / sqrt(mean(x^2) + eps) * weight. x and y may be the same.
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* y);
  /// Rotary embedding of `heads` consecutive vectors of head_dim, in place, Hugging Face's half-split convention:
  /// (a, b) = (x[i], x[i + head_dim/2]) -> (a*cos[i] - b*sin[i], b*cos[i] + a*sin[i]). cos, sin: [head_dim / 2].
  void (*rope)(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin);
  /// y += x.
  void (*add)(const float* x, int64_t count, float* y);
  /// y = gate / (1 + exp(-gate)) * up, elementwise. y may be gate.
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* y);
  /// Attention of `heads` query heads that share one key-value head, one token, all positions of the spans visible:
  /// out[h] = sum_j softmax_j(scale * q[h].k[j]) v[j]. q, out: [heads][head_dim]; scores: scratch [heads][sum of
  /// lengths].
  void (*attention)(const float* q, int64_t heads, int64_t head_dim, const KvSpan* spans, int64_t span_count,
                    float scale, float* scores, float* out);
};

/// Table of the named instruction set, or nullptr when it was not built or this machine cannot run it.
const KernelTable* find_kernels(std::string_view isa);
/// Every instruction set this machine can run, slowest first. Never empty: "scalar" is always there.
std::vector<std::string_view> available_isas();
/// The last of available_isas(), or the one `forced` names when it is not empty.
/// Throws std::invalid_argument, listing the available ones, when the forced one cannot run.
const KernelTable& select_kernels(std::string_view forced);

}  // namespace elutq
