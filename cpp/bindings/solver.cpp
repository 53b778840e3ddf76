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
#include "solver/dequantize.h"
#include "solver/hlq_fit.h"
#include "solver/learned_rounding.h"
#include "solver/solve_group.h"
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
using ConstFloats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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

template <typename Array>
void check_shape(const Array& array, int64_t rows, int64_t columns, const char* name) {
  if (static_cast<int64_t>(array.shape(0)) != rows || static_cast<int64_t>(array.shape(1)) != columns) {
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(rows) + " by " +
                                std::to_string(columns));
  }
}

void dequantize(nb::handle matrix, const Floats& values, int threads) {
  const HlqMatrix arrays(matrix);
  const auto& [shape, planes, scales, zeros, row_scales] = arrays.view();
  check_shape(values, shape.out_features, shape.in_features, "values");
  elutq::FitProblem problem;
  problem.out_features = shape.out_features;
  problem.in_features = shape.in_features;
  problem.bits = shape.bits;
  problem.group_size = shape.group_size;
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  elutq::dequantize(problem, {planes, scales, zeros, row_scales}, values.data(), pool);
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

void solve_group(const ConstFloats& target, const ConstFloats& metric, const std::optional<ConstFloats>& feedback,
                 const std::optional<Importance>& row_scales, bool resume, int rounds, int descents,
                 const Floats& parameters, const Bytes& codes, const Floats& values, int threads) {
  elutq::CalibratedGroup group;
  group.columns = static_cast<int64_t>(target.shape(0));
  group.rows = static_cast<int64_t>(target.shape(1));
  group.bits = static_cast<int>(parameters.shape(0)) - 1;
  check_shape(metric, group.columns, group.columns, "metric");
  if (feedback) check_shape(*feedback, group.columns, group.columns, "feedback");
  if (row_scales && static_cast<int64_t>(row_scales->shape(0)) != group.rows) {
    throw std::invalid_argument("row_scales must be one for each row");
  }
  check_shape(parameters, group.bits + 1, group.rows, "parameters");
  check_shape(codes, group.columns, group.rows, "codes");
  check_shape(values, group.columns, group.rows, "values");
  group.target = target.data();
  group.metric = metric.data();
  group.feedback = feedback ? feedback->data() : nullptr;
  group.row_scales = row_scales ? row_scales->data() : nullptr;
  group.resume = resume;
  group.rounds = rounds;
  group.descents = descents;
  group.parameters = parameters.data();
  group.codes = codes.data();
  group.values = values.data();
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  elutq::solve_group(group, pool);
}

template <typename Latent>
elutq::SoftWeights soft_weights(const Latent& latent, const ConstFloats& levels, float temperature) {
  check_shape(levels, static_cast<int64_t>(latent.shape(0)), static_cast<int64_t>(levels.shape(1)), "levels");
  return {static_cast<int64_t>(latent.shape(1)), static_cast<int>(levels.shape(1)), temperature, latent.data(),
          levels.data()};
}

void soft_values(const ConstFloats& latent, const ConstFloats& levels, float temperature, const Floats& values,
                 int threads) {
  const elutq::SoftWeights soft = soft_weights(latent, levels, temperature);
  const auto groups = static_cast<int64_t>(latent.shape(0));
  check_shape(values, groups, soft.columns, "values");
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  elutq::soft_values(soft, groups, values.data(), pool);
}

void soft_gradients(const ConstFloats& latent, const ConstFloats& levels, float temperature,
                    const ConstFloats& gradient, const Floats& for_latent, const Floats& for_levels, int threads) {
  const elutq::SoftWeights soft = soft_weights(latent, levels, temperature);
  const auto groups = static_cast<int64_t>(latent.shape(0));
  check_shape(gradient, groups, soft.columns, "gradient");
  check_shape(for_latent, groups, soft.columns, "for_latent");
  check_shape(for_levels, groups, soft.levels, "for_levels");
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  elutq::soft_gradients(soft, groups, gradient.data(), for_latent.data(), for_levels.data(), pool);
}

void settle(const Floats& latent, const ConstFloats& levels, float distance, int threads) {
  const elutq::SoftWeights soft = soft_weights(latent, levels, 0.0f);
  const auto groups = static_cast<int64_t>(latent.shape(0));
  const nb::gil_scoped_release release;
  elutq::ThreadPool pool(threads);
  elutq::settle(soft, groups, distance, latent.data(), pool);
}

}  // namespace

void bind_solver(nb::module_& m) {
  m.def("fit_hlq", &fit, nb::arg("weights"), nb::arg("type"), nb::arg("group_size"), nb::arg("method"),
        nb::arg("importance").none(), nb::arg("planes"), nb::arg("scales"), nb::arg("zeros"), nb::arg("threads"),
        "Quantizes weights into planes, scales and zeros; returns the largest magnitude, NaN when a weight is NaN.");
  m.def("dequantize", &dequantize, nb::arg("matrix"), nb::arg("values").noconvert(), nb::arg("threads"),
        "Writes what a quantized matrix stands for.");
  m.def("squared_error", &squared_error, nb::arg("weights"), nb::arg("type"), nb::arg("matrix"), nb::arg("threads"),
        "Returns ||W - W~||^2 and ||W||^2 of weights and their quantized form.");
  m.def("solve_group", &solve_group, nb::arg("target"), nb::arg("metric"), nb::arg("feedback").none(),
        nb::arg("row_scales").none(), nb::arg("resume"), nb::arg("rounds"), nb::arg("descents"),
        nb::arg("parameters").noconvert(), nb::arg("codes").noconvert(), nb::arg("values").noconvert(),
        nb::arg("threads"), "Quantizes a group of columns in the metric of a Hessian, in place.");
  m.def("soft_values", &soft_values, nb::arg("latent"), nb::arg("levels"), nb::arg("temperature"),
        nb::arg("values").noconvert(), nb::arg("threads"),
        "Writes weights that lie between two levels of their group each.");
  m.def("soft_gradients", &soft_gradients, nb::arg("latent"), nb::arg("levels"), nb::arg("temperature"),
        nb::arg("gradient"), nb::arg("for_latent").noconvert(), nb::arg("for_levels").noconvert(), nb::arg("threads"),
        "Writes the gradients of soft_values' inputs from those of its weights.");
  m.def("settle", &settle, nb::arg("latent").noconvert(), nb::arg("levels"), nb::arg("distance"), nb::arg("threads"),
        "Moves latent weights to the nearest levels of their group, by at most a distance.");
}
