#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>

#include <memory>
#include <stdexcept>

#include "bindings/bindings.h"
#include "engine/packed_linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace elutq;

template <typename T, int kDimensions>
using Array = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

HlqView hlq_view(const Array<uint8_t, 3>& planes, const Array<uint16_t, 3>& scales, const Array<uint16_t, 2>& zeros,
                 int64_t in_features, int64_t group_size) {
  const auto extent = [](const auto& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); };
  require(in_features > 0, "in_features must be at least 1");
  require(group_size == -1 || group_size > 0, "group_size must be positive, or -1 for a whole row");
  const HlqShape shape{.out_features = extent(planes, 1),
                       .in_features = in_features,
                       .bits = static_cast<int>(extent(planes, 0)),
                       .group_size = group_size == -1 ? in_features : group_size};
  require(extent(planes, 2) == (in_features + 7) / 8, "planes must be [bits, out_features, ceil(in_features / 8)]");
  require(
      extent(scales, 0) == shape.out_features && extent(scales, 1) == shape.groups() && extent(scales, 2) == shape.bits,
      "scales must be [out_features, groups, bits]");
  require(extent(zeros, 0) == shape.out_features && extent(zeros, 1) == shape.groups(),
          "zeros must be [out_features, groups]");
  return {shape, planes.data(), scales.data(), zeros.data()};
}

Matrix multiply(const PackedLinear& linear, const Array<float, 2>& x) {
  require(static_cast<int64_t>(x.shape(1)) == linear.in_features(), "x must be [tokens, in_features]");
  const auto tokens = static_cast<int64_t>(x.shape(0));
  auto y = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(tokens * linear.out_features()));
  {
    const nb::gil_scoped_release release;
    linear.multiply(x.data(), tokens, y.get());
  }
  float* values = y.release();
  const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Matrix(values, {static_cast<size_t>(tokens), static_cast<size_t>(linear.out_features())}, owner);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<LinearRunner>(m, "LinearRunner", nb::is_weak_referenceable(),
                           "Kernels and threads for linears outside a model.")
      .def(nb::init<std::string_view, int, bool>(), "isa"_a, "threads"_a, "exact"_a = false)
      .def_prop_ro("isa", &LinearRunner::isa);

  nb::class_<PackedLinear>(m, "PackedLinear", "One HLQ matrix, packed for this machine.")
      .def(
          "__init__",
          [](PackedLinear* self, std::shared_ptr<LinearRunner> runner, const Array<uint8_t, 3>& planes,
             const Array<uint16_t, 3>& scales, const Array<uint16_t, 2>& zeros, int64_t in_features,
             int64_t group_size) {
            const HlqView matrix = hlq_view(planes, scales, zeros, in_features, group_size);
            const nb::gil_scoped_release release;
            new (self) PackedLinear(std::move(runner), matrix);
          },
          "runner"_a, "planes"_a, "scales"_a, "zeros"_a, "in_features"_a, "group_size"_a)
      .def_prop_ro("memory_bytes", &PackedLinear::memory_bytes)
      .def("multiply", &multiply, "x"_a);
}
