#include "ops/linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace elutq {
namespace {

/// Parts per thread: enough that a thread which lost its core for a moment does not hold up the others.
constexpr int64_t kPartsPerThread = 4;
/// A part smaller than this (weight bytes x tokens) costs more to hand out than to compute.
constexpr int64_t kMinPartCost = 16 * 1024;

int64_t dense_value_bytes(DenseType type) { return type == DenseType::kFloat32 ? 4 : 2; }

std::string shape_text(int64_t out_features, int64_t in_features) {
  return "(" + std::to_string(out_features) + ", " + std::to_string(in_features) + ")";
}

}  // namespace

// ---- Activations ----------------------------------------------------------------------------------------------------

Activations::Activations(int64_t max_tokens, int64_t features)
    : max_tokens_(max_tokens), features_(features), values_(max_tokens * features) {}

Activations::Activations(int64_t max_tokens, const Activations& source) : Activations(max_tokens, source.features_) {
  for (const Tables& tables : source.tables_) {
    Tables& added = tables_.emplace_back();
    added.segment_size = tables.segment_size;
    added.views.resize(max_tokens);
  }
}

void Activations::reserve_tables(const Linear& consumer) {
  if (consumer.in_features() != features_) {
    throw std::invalid_argument("a linear of " + std::to_string(consumer.in_features()) +
                                " input features cannot read activations of " + std::to_string(features_));
  }
  if (!consumer.is_hlq() || tables(consumer.shape_.segment_size()) != nullptr) return;
  const int64_t stride = consumer.shape_.table_stride();
  const int64_t segments = consumer.shape_.segments();
  Tables& added = tables_.emplace_back();
  added.segment_size = consumer.shape_.segment_size();
  added.entries = AlignedBuffer<uint8_t>(max_tokens_ * stride);
  added.scales = AlignedBuffer<float>(max_tokens_ * segments);
  added.sums = AlignedBuffer<float>(max_tokens_ * segments);
  for (int64_t token = 0; token < max_tokens_; ++token) {
    added.views.push_back({added.entries.data() + token * stride, added.scales.data() + token * segments,
                           added.sums.data() + token * segments});
  }
}

void Activations::build(const KernelTable& kernels, int64_t token, std::span<const Linear* const> consumers) {
  for (Tables& tables : tables_) {
    const bool needed = std::any_of(consumers.begin(), consumers.end(), [&](const Linear* linear) {
      return linear->is_hlq() && linear->shape_.segment_size() == tables.segment_size;
    });
    if (needed) kernels.build_tables(row(token), features_, tables.segment_size, tables.views[token]);
  }
}

void Activations::share(int64_t token, const Activations& source, int64_t source_token, bool values) {
  for (size_t i = 0; i < tables_.size(); ++i) tables_[i].views[token] = source.tables_[i].views[source_token];
  if (values) std::copy_n(source.row(source_token), features_, row(token));
}

const TableView* Activations::tables(int64_t segment_size) const {
  for (const Tables& tables : tables_) {
    if (tables.segment_size == segment_size) return tables.views.data();
  }
  return nullptr;
}

// ---- Linear ---------------------------------------------------------------------------------------------------------

Linear::Linear(int64_t out_features, int64_t in_features) {
  if (out_features < 1 || in_features < 1) {
    throw std::invalid_argument("a linear needs at least one output and one input feature");
  }
  shape_.out_features = out_features;
  shape_.in_features = in_features;
}

void Linear::set_hlq(const Backend& backend, const HlqView& matrix, Arena& arena) {
  const HlqShape& shape = matrix.shape;
  if (shape.out_features != out_features() || shape.in_features != in_features()) {
    throw std::invalid_argument("an HLQ matrix of shape " + shape_text(shape.out_features, shape.in_features) +
                                " does not fit a linear of shape " + shape_text(out_features(), in_features()));
  }
  if (shape.bits < 1 || shape.bits > kMaxBits) {
    throw std::invalid_argument("an HLQ matrix has 1 to 4 bits, not " + std::to_string(shape.bits));
  }
  if (shape.param_bits != 16 && shape.param_bits != 8) {
    throw std::invalid_argument("HLQ parameters have 16 or 8 bits, not " + std::to_string(shape.param_bits));
  }
  const bool power_of_two = (shape.group_size & (shape.group_size - 1)) == 0;
  const bool fixed_group = power_of_two && shape.group_size >= 32 && shape.group_size <= 256;
  if (!fixed_group && shape.group_size != shape.in_features) {
    throw std::invalid_argument("HLQ groups have 32, 64, 128 or 256 columns or a whole row, not " +
                                std::to_string(shape.group_size));
  }
  const int64_t bytes = backend.kernels->packed_bytes(shape);
  const std::shared_ptr<uint8_t> packed = arena.allocate(static_cast<size_t>(bytes));
  backend.pool->run_ranges(shape.out_features, backend.kernels->row_tile, [&](int64_t begin, int64_t end) {
    backend.kernels->pack(matrix, begin, end, packed.get());
  });
  shape_ = shape;
  packed_ = packed;
  packed_bytes_ = bytes;
  dense_ = nullptr;
  owner_.reset();
}

void Linear::set_dense(DenseType type, const void* weights, std::shared_ptr<const void> owner) {
  shape_.bits = 0;
  packed_ = nullptr;
  packed_bytes_ = 0;
  dense_type_ = type;
  dense_ = weights;
  owner_ = std::move(owner);
}

int64_t Linear::row_bytes() const {
  if (!is_hlq()) return in_features() * dense_value_bytes(dense_type_);
  const int64_t row_scale_bytes = shape_.param_bits == 8 ? 2 : 0;
  return shape_.bits * ((shape_.in_features + 7) / 8) + (shape_.bits + 1) * shape_.groups() * (shape_.param_bits / 8) +
         row_scale_bytes;
}

void Linear::read_row(const KernelTable& kernels, int64_t row, float* weights) const {
  if (is_hlq()) {
    kernels.unpack_row(shape_, packed_.get(), row, weights);
  } else {
    const uint8_t* values = static_cast<const uint8_t*>(dense_) + row * row_bytes();
    kernels.to_float(dense_type_, values, in_features(), weights);
  }
}

void Linear::multiply(const Backend& backend, const Activations& x, Rows tokens, int64_t row_begin, int64_t row_end,
                      float* y, int64_t y_stride) const {
  const KernelTable& kernels = *backend.kernels;
  if (!is_hlq()) {
    kernels.matmul_dense(dense_type_, dense_, in_features(), x.row(tokens.begin), in_features(), tokens.count,
                         row_begin, row_end, y, y_stride);
  } else if (backend.exact) {
    kernels.matmul_exact(shape_, packed_.get(), x.row(tokens.begin), in_features(), tokens.count, row_begin, row_end, y,
                         y_stride);
  } else {
    kernels.matmul(shape_, packed_.get(), x.tables(shape_.segment_size()) + tokens.begin, tokens.count, row_begin,
                   row_end, y, y_stride);
  }
  if (!bias_.empty()) {
    for (int64_t t = 0; t < tokens.count; ++t) {
      kernels.add(bias_.data() + row_begin, row_end - row_begin, y + t * y_stride + row_begin);
    }
  }
}

void run_linears(const Backend& backend, const Activations& x, std::span<const LinearCall> calls) {
  const int64_t tile = backend.kernels->row_tile;
  const int64_t panel = backend.kernels->row_panel;
  const auto cost_of = [](const LinearCall& call) { return call.linear->bytes() * call.tokens.count; };
  int64_t total = 0;
  int64_t panels = 0;
  for (const LinearCall& call : calls) {
    total += cost_of(call);
    panels += (call.linear->out_features() + panel - 1) / panel;
  }
  const int64_t threads = backend.pool->size();
  // Two parts that share a panel read it in pieces. So they are of whole panels, if that leaves the busiest thread with
  // at most an eighth more than the average.
  const int64_t busiest = (panels + threads - 1) / threads;
  const bool whole_panels = 8 * busiest * threads <= 9 * panels;
  const int64_t unit = whole_panels ? panel : tile;
  const int64_t most = threads == 1 ? 1 : threads * kPartsPerThread;
  const int64_t parts = std::clamp<int64_t>(total / kMinPartCost, 1, whole_panels ? std::min(panels, most) : most);

  // The linears lie one after the other on a line as long as the whole cost; part p computes the rows between two
  // points of it.
  const auto run_part = [&](int64_t part) {
    const int64_t from = total * part / parts;
    const int64_t to = total * (part + 1) / parts;
    int64_t start = 0;
    for (const LinearCall& call : calls) {
      const int64_t rows = call.linear->out_features();
      const int64_t cost = cost_of(call);
      const auto row_at = [&](int64_t point) {
        if (point >= start + cost) return rows;
        const int64_t row = std::max<int64_t>(point - start, 0) * rows / cost;
        return std::min((row + unit / 2) / unit * unit, rows);
      };
      const int64_t begin = row_at(from);
      const int64_t end = row_at(to);
      if (begin < end) {
        call.linear->multiply(backend, x, call.tokens, begin, end, call.y, call.y_stride);
        for (int64_t t = 0; call.residual != nullptr && t < call.tokens.count; ++t) {
          backend.kernels->add(call.y + t * call.y_stride + begin, end - begin,
                               call.residual + t * call.y_stride + begin);
        }
      }
      start += cost;
    }
  };
  backend.pool->run_streams(parts, run_part);
}

}  // namespace elutq
