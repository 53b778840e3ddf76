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
/// every row then looks its own four bits up. Slots come in PAIRS, slot j of a block of 32 columns with slot j + 4; the
/// scale is such that the sum of a pair is an int8 number too, so kernels add a pair as bytes, modulo 256, and widen
/// once for both. It costs little: where one slot is large, its partner hardly ever is. A segment is `segment_size`
/// consecutive columns: a whole group, or 128 columns of a longer group, the last one possibly shorter. Integers add
/// exactly, so the sum of a segment is the same on every instruction set, bit for bit; and the floating-point steps
/// that follow are fixed, fused multiply-adds included:
///
///     for each segment, in order, with g its group and acc = 0 at first:
///       u   = scale[0] * float(isum[0]);  for p = 1 .. bits-1:  u   = fma(scale[p], float(isum[p]), u)
///       acc = fma(u, table_scale[segment], acc)
///       mid = zero;                       for p = 0 .. bits-1:  mid = fma(0.5, scale[p], mid)
///       acc = fma(mid, table_sum[segment], acc)
///     y = acc
///
/// Parameters of 8 bits are integers under a factor per row, w = row_scale * (zero + sum_p scale[p] * bit_p). The steps
/// are the same, with the integers as floats, but for the last: y = row_scale * acc.
///
/// Therefore one output depends on its own row and its own token alone: not on the batch, the number of threads, the
/// split of the rows or the instruction set. The other entries keep the same promise: attention adds in the order
/// stated there, and all others add floats in 16 lanes (element i to lane i % 16, in order) and then fold lane i + 8
/// onto i, i + 4, i + 2, i + 1. So a whole forward pass gives the same bits on every machine.

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
/// Most that the entries of a pair of slots add up to before they are rounded: 127 after.
inline constexpr float kLargestPair = 126.0f;

/// Dimensions of an HLQ matrix. group_size is in columns: a multiple of 32, or in_features for a whole-row group.
/// The members are always inlined because objects of every instruction set use them: an out-of-line copy that the
/// linker took from an AVX-512 object would crash a smaller machine.
struct HlqShape {
  int64_t out_features = 0;
  int64_t in_features = 0;
  int bits = 0;
  int64_t group_size = 0;
  int param_bits = 16;  ///< of a scale or zero: 16, or 8 under a scale per row

  [[gnu::always_inline]] int64_t groups() const { return (in_features + group_size - 1) / group_size; }
  [[gnu::always_inline]] int64_t segment_size() const { return group_size < kMaxSegment ? group_size : kMaxSegment; }
  [[gnu::always_inline]] int64_t segments() const { return (in_features + segment_size() - 1) / segment_size(); }
  [[gnu::always_inline]] int64_t padded_in() const {
    return (in_features + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
  }
  [[gnu::always_inline]] int64_t slots() const { return padded_in() / kSlotColumns; }
  [[gnu::always_inline]] int64_t table_bytes() const { return slots() * 16; }
  /// From one token's tables to the next's, where a caller lays out many: 512 bytes off a multiple of 4096, lest the
  /// tables that a kernel reads together share the few places a first-level cache has for one such distance.
  [[gnu::always_inline]] int64_t table_stride() const { return (table_bytes() + 4095 - 512) / 4096 * 4096 + 512; }
};

/// An HLQ matrix as it lies on disk (docs/format.md).
struct HlqView {
  HlqShape shape;
  const uint8_t* planes = nullptr;       ///< [bits][out_features][ceil(in_features / 8)]
  const void* scales = nullptr;          ///< fp16 or uint8 [out_features][groups][bits]
  const void* zeros = nullptr;           ///< fp16 or int8 [out_features][groups]
  const uint16_t* row_scales = nullptr;  ///< fp16 [out_features]; parameters of 8 bits only
};

/// Lookup tables of one token for matrices of one in_features and segment_size; the same on every instruction set.
/// Memory is owned by the caller; entries must be aligned to 64 bytes.
struct TableView {
  uint8_t* entries =
      nullptr;  ///< [table_bytes], [slots][16]: 64 + round(entry * (kLargestPair / largest)), half to even, modulo 256
  /// [segments]: largest / kLargestPair, largest = the most that max |entry| of a pair's slots add up to; 0 when that
  /// is below 2^-100
  float* scales = nullptr;
  float* sums = nullptr;  ///< [segments]: sum of the segment's activations
};

enum class DenseType { kFloat32, kFloat16, kBFloat16 };

enum class KvType { kFloat16, kInt8 };

/// Positions of a page of a sequence's cache, and of a section, whose softmax is computed at once. Both begin at
/// multiples of their length: where a position lies and what it is added to never depends on how it came there.
inline constexpr int64_t kPagePositions = 64;
inline constexpr int64_t kSectionPositions = 1024;

/// How the keys and values of one layer lie in a page: all heads' keys side by side, then all heads' values, since
/// memory is read at its full speed only where much of it is read in a row.
///
///     keys    [heads] of  [head_dim][kPagePositions]        so that one vector holds the same column of many positions
///                         scales, fp32 [kPagePositions]     int8 only: x = scale * stored
///     values  [heads] of  [kPagePositions][value_columns]
///                         scales, likewise
struct KvLayout {
  KvType type = KvType::kFloat16;
  int64_t heads = 0;  ///< key-value heads
  int64_t head_dim = 0;

  [[gnu::always_inline]] int64_t element_bytes() const { return type == KvType::kFloat16 ? 2 : 1; }
  /// head_dim, padded to whole vectors.
  [[gnu::always_inline]] int64_t value_columns() const { return (head_dim + 15) / 16 * 16; }
  [[gnu::always_inline]] int64_t scales_bytes() const {
    return type == KvType::kInt8 ? kPagePositions * static_cast<int64_t>(sizeof(float)) : 0;
  }
  /// Where a head's keys begin, and the scales that follow them; multiples of 64, like all that follows.
  [[gnu::always_inline]] int64_t keys_offset(int64_t head) const { return head * keys_bytes(); }
  [[gnu::always_inline]] int64_t key_scales_offset(int64_t head) const {
    return keys_offset(head + 1) - scales_bytes();
  }
  [[gnu::always_inline]] int64_t values_offset(int64_t head) const {
    return heads * keys_bytes() + head * values_bytes();
  }
  [[gnu::always_inline]] int64_t value_scales_offset(int64_t head) const {
    return values_offset(head + 1) - scales_bytes();
  }
  /// Of the layer's part of a page.
  [[gnu::always_inline]] int64_t bytes() const { return values_offset(heads); }

 private:
  [[gnu::always_inline]] int64_t keys_bytes() const {
    return head_dim * kPagePositions * element_bytes() + scales_bytes();
  }
  [[gnu::always_inline]] int64_t values_bytes() const {
    return kPagePositions * value_columns() * element_bytes() + scales_bytes();
  }
};

/// Some key-value heads and all query heads that share them, of consecutive tokens of one sequence.
struct AttentionTile {
  KvLayout layout;
  const uint8_t* const* pages = nullptr;  ///< the sequence's pages, from position 0 on, aligned to 64 bytes
  int64_t layer_offset = 0;               ///< where the layer's part begins in each page
  int64_t kv_head = 0;                    ///< the first of the key-value heads
  int64_t kv_heads = 0;
  int64_t group = 0;     ///< query heads that share one
  int64_t position = 0;  ///< of the first token; token t sees up to position + t, itself included
  int64_t window = 0;    ///< a token sees so many positions at most; 0: all
  int64_t tokens = 0;
  const float* q = nullptr;  ///< q[t * q_stride + h * head_dim + d], h from the first head's group on
  int64_t q_stride = 0;
  float scale = 0.0f;  ///< of the scores

  /// Rows are [kv_heads][tokens][group].
  [[gnu::always_inline]] int64_t rows() const { return kv_heads * rows_per_head(); }
  [[gnu::always_inline]] int64_t rows_per_head() const { return tokens * group; }
  [[gnu::always_inline]] int64_t token(int64_t row) const { return row / group % tokens; }
  /// Where a row's query begins in q, and its result in an output of the same shape.
  [[gnu::always_inline]] int64_t row_offset(int64_t row) const {
    const int64_t head = row / rows_per_head() * group + row % group;
    return token(row) * q_stride + head * layout.head_dim;
  }
  /// First section that a token sees, and one past the last.
  [[gnu::always_inline]] int64_t section_begin() const {
    return window == 0 || position < window ? 0 : (position + 1 - window) / kSectionPositions;
  }
  [[gnu::always_inline]] int64_t section_end() const { return (position + tokens - 1) / kSectionPositions + 1; }
};

/// Floats of what one row keeps of a section: [value_columns] values, each times its weight exp(score - largest), added
/// up; the largest score; the sum of the weights, 0 when the row sees nothing there.
[[gnu::always_inline]] inline int64_t partial_floats(const KvLayout& layout) { return layout.value_columns() + 2; }
/// Floats between the scores of two rows: a little more than a section, which would put all rows' into one cache set.
inline constexpr int64_t kScoreStride = kSectionPositions + 16;

struct KernelTable {
  std::string_view isa;  ///< "scalar", "avx2", "avx512", "avx512vbmi", "neon"
  /// Rows are packed in tiles of this many. Row ranges given to pack and matmul begin at a multiple of it and end at
  /// a multiple of it or at out_features.
  int64_t row_tile;
  /// The tiles of so many rows lie side by side: ranges that begin and end at multiples of it are read in one piece.
  int64_t row_panel;

  // ---- HLQ matrices --------------------------------------------------------------------------------------------

  /// Bytes of the packed matrix, last partial tile included. Packed memory must be aligned to 64 bytes.
  int64_t (*packed_bytes)(const HlqShape& shape);
  /// Repacks rows [row_begin, row_end). Disjoint row ranges may be packed concurrently.
  void (*pack)(const HlqView& matrix, int64_t row_begin, int64_t row_end, uint8_t* packed);
  /// Dequantizes one row to fp32 [in_features]: w = fma(scale[p], bit_p, w) from w = zero, p ascending; parameters of
  /// 8 bits: times the row's scale, which is exact.
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
  /// y = scale * x + y, rounded once.
  void (*add_scaled)(const float* x, float scale, int64_t count, float* y);
  /// x = e^(x - max(x)) * (1 / sum), in place; count at least 1.
  void (*softmax)(float* x, int64_t count);
  /// y = gate / (1 + exp(-gate)) * up, elementwise. y may be gate.
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* y);

  // ---- Attention ----------------------------------------------------------------------------------------------
  //
  // The keys and values a token sees are cut at fixed positions, into sections. In each, for each head,
  //
  //     score[j]  = scale * sum_d q[d] * key[j][d]                       d ascending, from 0, fused
  //     weight[j] = exp(score[j] - largest)                              `largest`, and the weights' sum in 16 lanes
  //     value[d]  = sum_j weight[j] * value[j][d]                        j ascending, from 0, fused
  //
  // with score[j] times the key's scale and weight[j] times the value's in an int8 cache. Sections are then merged:
  // with `most` the largest of all, out[d] = sum_s w_s * value_s[d] * (1 / sum_s w_s * sum_s), w_s = exp(largest_s -
  // most), s ascending, fused. Nothing depends on what other tokens are attended with.

  /// Puts keys and values, fp32 [heads][head_dim], into slot 0..63 of one layer's part of a page. int8: rounded to
  /// multiples of a head's largest / 127, half to even; all 0 when the largest magnitude is below 2^-100.
  void (*store_kv)(const KvLayout& layout, const float* keys, const float* values, int64_t slot, uint8_t* page);
  /// Attention within a section. scores: scratch [rows][kScoreStride]; partials: [rows][partial_floats].
  void (*attention)(const AttentionTile& tile, int64_t section, float* scores, float* partials);
  /// Merges a tile's partials, [sections][rows][partial_floats], at least one of them not empty for each row.
  /// out: of the shape of q.
  void (*merge_attention)(const AttentionTile& tile, int64_t sections, const float* partials, float* out);
};

/// Table of the named instruction set, or nullptr when it was not built or this machine cannot run it.
const KernelTable* find_kernels(std::string_view isa);
/// Every instruction set this machine can run, slowest first. Never empty: "scalar" is always there.
std::vector<std::string_view> available_isas();
/// The last of available_isas(), or the one `forced` names when it is not empty.
/// Throws std::invalid_argument, listing the available ones, when the forced one cannot run.
const KernelTable& select_kernels(std::string_view forced);

}  // namespace elutq
