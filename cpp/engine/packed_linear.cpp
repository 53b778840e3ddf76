#include "engine/packed_linear.h"

#include <algorithm>
#include <array>
#include <utility>

namespace elutq {

namespace {

constexpr int64_t kTokensAtOnce = 256;  // bounds the memory of the tables

}  // namespace

LinearRunner::LinearRunner(std::string_view isa, int threads, bool exact)
    : pool_(threads), backend_{&select_kernels(isa), &pool_, exact} {}

PackedLinear::PackedLinear(std::shared_ptr<LinearRunner> runner, const HlqView& matrix)
    : runner_(std::move(runner)), linear_(matrix.shape.out_features, matrix.shape.in_features) {
  const std::lock_guard lock(runner_->mutex());
  linear_.set_hlq(runner_->backend(), matrix, runner_->arena());
}

void PackedLinear::multiply(const float* x, int64_t tokens, float* y) const {
  const std::lock_guard lock(runner_->mutex());
  const Backend& backend = runner_->backend();
  Activations activations(std::min(tokens, kTokensAtOnce), in_features());
  activations.reserve_tables(linear_);
  const std::array<const Linear*, 1> consumers = {&linear_};
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    const int64_t count = std::min(tokens - first, kTokensAtOnce);
    for_each(backend, count, [&](int64_t t) {
      std::copy_n(x + (first + t) * in_features(), in_features(), activations.row(t));
      if (!backend.exact) activations.build(*backend.kernels, t, consumers);
    });
    run_linears(backend, activations,
                std::array<LinearCall, 1>{{{&linear_, {0, count}, y + first * out_features(), out_features()}}});
  }
}

}  // namespace elutq
