#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/arena.h"
#include "ops/backend.h"

namespace elutq {

class Linear;

/// Consecutive rows of activations.
struct Rows {
  int64_t begin = 0;
  int64_t count = 0;
};

/// The inputs of linears, fp32 [tokens][features], and their lookup tables: built once, shared by every linear that
/// reads them.
class Activations {
 public:
  Activations(int64_t max_tokens, int64_t features);
  /// Room for rows of `source`, for whose consumers tables are reserved, in another order: see share().
  Activations(int64_t max_tokens, const Activations& source);

  int64_t features() const { return features_; }
  float* row(int64_t token) { return values_.data() + token * features_; }
  const float* row(int64_t token) const { return values_.data() + token * features_; }

  /// Makes room for the tables that `consumer` reads. To be called for every consumer before any build().
  void reserve_tables(const Linear& consumer);
  /// Builds the tables of one token that `consumers` read. Different tokens may be built concurrently.
  void build(const KernelTable& kernels, int64_t token, std::span<const Linear* const> consumers);
  /// Makes row `token` the one that `source`, as given to the constructor, holds at `source_token`: its tables are
  /// shared and, where `values` are wanted, these copied. Different tokens may be shared concurrently.
  void share(int64_t token, const Activations& source, int64_t source_token, bool values);
  /// Tables of all tokens, [max_tokens]; nullptr when no consumer asked for this segment size.
  const TableView* tables(int64_t segment_size) const;

 private:
  struct Tables {
    int64_t segment_size;
    AlignedBuffer<uint8_t> entries;  // [max_tokens][table_stride]
    AlignedBuffer<float> scales;     // [max_tokens][segments]
    AlignedBuffer<float> sums;       // [max_tokens][segments]
    std::vector<TableView> views;    // [max_tokens]
  };

  int64_t max_tokens_;
  int64_t features_;
  AlignedBuffer<float> values_;
  std::vector<Tables> tables_;  // one per segment size
};

/// A linear module: a weight matrix (out_features, in_features), packed HLQ or dense in place, and an optional bias.
class Linear {
 public:
  Linear() = default;
  /// A module of this shape, without weights yet.
  Linear(int64_t out_features, int64_t in_features);

  /// Packs an HLQ matrix in parallel, into memory of `arena`. Both may go away afterwards.
  /// Throws std::invalid_argument when its shape is not this module's, or not one that kernels take.
  void set_hlq(const Backend& backend, const HlqView& matrix, Arena& arena);
  /// Keeps `weights` [out_features][in_features] where it is, and `owner` alive with it.
  void set_dense(DenseType type, const void* weights, std::shared_ptr<const void> owner);
  /// Added to every product when not empty: [out_features].
  std::vector<float>& bias() { return bias_; }

  bool has_weights() const { return is_hlq() || dense_ != nullptr; }
  bool is_hlq() const { return shape_.bits != 0; }
  int64_t out_features() const { return shape_.out_features; }
  int64_t in_features() const { return shape_.in_features; }
  /// Bytes of one row: planes, scales and zeros as stored on disk, or the dense values.
  int64_t row_bytes() const;
  /// Bytes of the matrix, which every product must read.
  int64_t bytes() const { return out_features() * row_bytes(); }
  /// Memory that the packed matrix takes; 0 for a dense one, which belongs to its owner.
  int64_t packed_bytes() const { return packed_bytes_; }

  /// Row `row` as fp32 [in_features]: embedding lookup.
  void read_row(const KernelTable& kernels, int64_t row, float* weights) const;
  /// y[t * y_stride + n] = sum_k w[n][k] x[tokens.begin + t][k] + bias[n] for n in [row_begin, row_end), t in
  /// [0, tokens.count). HLQ needs x built for this linear, but for exact backends. Ranges as KernelTable asks for.
  void multiply(const Backend& backend, const Activations& x, Rows tokens, int64_t row_begin, int64_t row_end, float* y,
                int64_t y_stride) const;

 private:
  friend class Activations;

  HlqShape shape_;  // bits is 0 unless HLQ
  std::shared_ptr<const uint8_t> packed_;
  int64_t packed_bytes_ = 0;
  DenseType dense_type_ = DenseType::kFloat32;
  const void* dense_ = nullptr;
  std::shared_ptr<const void> owner_;
  std::vector<float> bias_;
};

/// One product of a group: y [tokens.count][out_features], rows y_stride apart.
struct LinearCall {
  const Linear* linear = nullptr;
  Rows tokens;  ///< of the activations
  float* y = nullptr;
  int64_t y_stride = 0;
  float* residual = nullptr;  ///< when set, same layout as y: residual += y
};

/// Runs several linears over rows of the same activations in one parallel region, split over the threads by the work:
/// weight bytes x tokens.
void run_linears(const Backend& backend, const Activations& x, std::span<const LinearCall> calls);

}  // namespace elutq
