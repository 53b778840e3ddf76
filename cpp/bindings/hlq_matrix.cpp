#include "bindings/hlq_matrix.h"

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace nb = nanobind;

namespace {

constexpr nb::dlpack::dtype kFloat16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

HlqMatrix::HlqMatrix(nb::handle matrix)
    : planes_(nb::cast<Array>(matrix.attr("planes"))),
      scales_(nb::cast<Array>(matrix.attr("scales"))),
      zeros_(nb::cast<Array>(matrix.attr("zeros"))) {
  const auto in_features = nb::cast<int64_t>(matrix.attr("in_features"));
  const auto group_size = nb::cast<int64_t>(matrix.attr("group_size"));
  const nb::object row_scales = matrix.attr("row_scales");
  const bool in_bytes = !row_scales.is_none();
  if (in_bytes) row_scales_ = nb::cast<Array>(row_scales);

  require(in_features > 0, "in_features must be at least 1");
  require(group_size == -1 || group_size > 0, "group_size must be positive, or -1 for a whole row");
  require(planes_.ndim() == 3, "planes must be [bits, out_features, ceil(in_features / 8)]");
  elutq::HlqShape& shape = view_.shape;
  shape = {.out_features = static_cast<int64_t>(planes_.shape(1)),
           .in_features = in_features,
           .bits = static_cast<int>(planes_.shape(0)),
           .group_size = group_size == -1 ? in_features : group_size,
           .param_bits = in_bytes ? 8 : 16};
  const auto is = [](const Array& array, nb::dlpack::dtype type, std::initializer_list<int64_t> extents) {
    bool same = array.dtype() == type && array.ndim() == extents.size();
    size_t axis = 0;
    for (const int64_t extent : extents) same = same && array.shape(axis++) == static_cast<size_t>(extent);
    return same;
  };
  const nb::dlpack::dtype scale_type = in_bytes ? nb::dtype<uint8_t>() : kFloat16;
  const nb::dlpack::dtype zero_type = in_bytes ? nb::dtype<int8_t>() : kFloat16;
  require(is(planes_, nb::dtype<uint8_t>(), {shape.bits, shape.out_features, (in_features + 7) / 8}),
          "planes must be uint8 [bits, out_features, ceil(in_features / 8)]");
  require(is(scales_, scale_type, {shape.out_features, shape.groups(), shape.bits}),
          "scales must be [out_features, groups, bits], uint8 with row scales and float16 without");
  require(is(zeros_, zero_type, {shape.out_features, shape.groups()}),
          "zeros must be [out_features, groups], int8 with row scales and float16 without");
  require(!in_bytes || is(row_scales_, kFloat16, {shape.out_features}), "row_scales must be float16 [out_features]");

  view_.planes = static_cast<const uint8_t*>(planes_.data());
  view_.scales = scales_.data();
  view_.zeros = zeros_.data();
  if (in_bytes) view_.row_scales = static_cast<const uint16_t*>(row_scales_.data());
}
