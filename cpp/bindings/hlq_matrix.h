#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kernels/kernels.h"

/// An `elutq.packing.HlqMatrix` as kernels see it; keeps its arrays alive.
class HlqMatrix {
 public:
  /// Throws std::invalid_argument when types or shapes of the arrays do not fit each other.
  explicit HlqMatrix(nanobind::handle matrix);

  const elutq::HlqView& view() const { return view_; }

 private:
  using Array = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;

  Array planes_;
  Array scales_;
  Array zeros_;
  Array row_scales_;  // of no array when parameters have 16 bits
  elutq::HlqView view_;
};
