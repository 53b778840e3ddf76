#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/hlq_matrix.h"
#include "solver/hlq_fit.h"
#include "solver/squared_error.h"

namespace nb = nanobind;

namespace {

using elutq::FitMethod;
using elutq::WeightType;
using Weights = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Importance = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Zeros = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

WeightType weight_type(const std::string& name) {
  if (name == "float32") return WeightType::kFloat32;
  if (name == "float16") return WeightType::kFloat16;
  if (name == "bfloat16") return WeightType::kBFloat16;
  throw std::invalid_argument("weights must be float32, float16 or bfloat16, not " + name);
}

FitMethod fit_method(const std::string& name) {
  if (name == "hlq") return FitMethod::kHlq;
  if (name == "ao") return FitMethod::kAo;
  if (name == "uniform") return FitMethod::kUniform;
  if (name == "rtn") return FitMethod::kRtn;
  throw std::invalid_argument("method must be hlq, ao, uniform or rtn, not " + name);
}

elutq::FitProblem make_problem(const Weights& weights, const std::string& type, int64_t group_size, int bits) {
  elutq::FitProblem problem;
  problem.weights = weights.data();
  problem.type = weight_type(type);
  problem.out_features = static_cast<int64_t>(weights.shape(0));
  problem.in_features = static_cast<int64_t>(weights.shape(1));
  problem.bits = bits;
  problem.group_size = group_size;
  return problem;
}

float fit(const Weights& weights, const std::string& type, int64_t group_size, const std::string& method,
          const std::optional<Importance>& importance, const Planes& planes, const Scales& scales, const Zeros& zeros,
          int threads) {
  elutq::FitProblem problem = make_problem(weights, type, group_size, static_cast<int>(planes.shape(0)));
  problem.method = fit_method(method);
  problem.importance = importance ? importance->data() : nullptr;
  const elutq::FitOutput output{planes.data(), scales.data(), zeros.data()};
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  return elutq::fit_hlq(problem, output, pool);
}

std::pair<double, double> squared_error(const Weights& weights, const std::string& type, nb::handle matrix,
                                        int threads) {
  const HlqMatrix arrays(matrix);
  const auto& [shape, planes, scales, zeros, row_scales] = arrays.view();
  if (shape.out_features != static_cast<int64_t>(weights.shape(0)) ||
      shape.in_features != static_cast<int64_t>(weights.shape(1))) {
    throw std::invalid_argument("the weights' shape is not the matrix's");
  }
  const elutq::FitProblem problem = make_problem(weights, type, shape.group_size, shape.bits);
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  const elutq::SquaredError sums = elutq::squared_error(problem, {planes, scales, zeros, row_scales}, pool);
  return {sums.error, sums.norm};
}

}  // namespace

void bind_solver(nb::module_& m) {
  m.def("fit_hlq", &fit, nb::arg("weights"), nb::arg("type"), nb::arg("group_size"), nb::arg("method"),
        nb::arg("importance").none(), nb::arg("planes"), nb::arg("scales"), nb::arg("zeros"), nb::arg("threads"),
        "Quantizes weights into planes, scales and zeros; returns the largest magnitude, NaN when a weight is NaN.");
  m.def("squared_error", &squared_error, nb::arg("weights"), nb::arg("type"), nb::arg("matrix"), nb::arg("threads"),
        "Returns ||W - W~||^2 and ||W||^2 of weights and their quantized form.");
}
