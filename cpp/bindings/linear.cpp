#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>

#include <memory>
#include <stdexcept>

#include "bindings/bindings.h"
#include "bindings/hlq_matrix.h"
#include "engine/packed_linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace elutq;

using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Matrix multiply(const PackedLinear& linear, const Inputs& x) {
  if (static_cast<int64_t>(x.shape(1)) != linear.in_features()) {
    throw std::invalid_argument("x must be [tokens, in_features]");
  }
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
          [](PackedLinear* self, std::shared_ptr<LinearRunner> runner, nb::handle matrix) {
            const HlqMatrix arrays(matrix);
            const nb::gil_scoped_release release;
            new (self) PackedLinear(std::move(runner), arrays.view());
          },
          "runner"_a, "matrix"_a)
      .def_prop_ro("memory_bytes", &PackedLinear::memory_bytes)
      .def("multiply", &multiply, "x"_a);
}
