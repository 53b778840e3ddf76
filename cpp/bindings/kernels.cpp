#include "kernels/kernels.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "base/aligned.h"
#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "kernels/bandwidth.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, int kDimensions>
using Array = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

elutq::HlqView hlq_view(const Array<uint8_t, 3>& planes, const Array<uint16_t, 3>& scales,
                        const Array<uint16_t, 2>& zeros, int64_t in_features, int64_t group_size) {
  const auto extent = [](const auto& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); };
  require(in_features > 0, "in_features must be at least 1");
  require(group_size == in_features || (group_size > 0 && group_size % elutq::kMaxSegment == 0) || group_size == 32 ||
              group_size == 64,
          "group_size must be 32, 64, a multiple of 128 or in_features");
  const elutq::HlqShape shape{.out_features = extent(planes, 1),
                              .in_features = in_features,
                              .bits = static_cast<int>(extent(planes, 0)),
                              .group_size = group_size};
  require(shape.bits >= 1 && shape.bits <= elutq::kMaxBits, "planes must hold 1 to 4 bits");
  require(extent(planes, 2) == (in_features + 7) / 8, "planes must be [bits, out_features, ceil(in_features / 8)]");
  require(
      extent(scales, 0) == shape.out_features && extent(scales, 1) == shape.groups() && extent(scales, 2) == shape.bits,
      "scales must be [out_features, groups, bits]");
  require(extent(zeros, 0) == shape.out_features && extent(zeros, 1) == shape.groups(),
          "zeros must be [out_features, groups]");
  return {shape, planes.data(), scales.data(), zeros.data()};
}

/// y = W x as the engine computes it: packs, builds tables, multiplies.
Matrix hlq_linear(const std::string& isa, const Array<uint8_t, 3>& planes, const Array<uint16_t, 3>& scales,
                  const Array<uint16_t, 2>& zeros, int64_t in_features, int64_t group_size, const Array<float, 2>& x,
                  int threads, bool exact) {
  const elutq::HlqView matrix = hlq_view(planes, scales, zeros, in_features, group_size);
  const elutq::HlqShape& shape = matrix.shape;
  require(static_cast<int64_t>(x.shape(1)) == in_features, "x must be [tokens, in_features]");
  const auto tokens = static_cast<int64_t>(x.shape(0));
  auto y = std::make_unique<float[]>(static_cast<size_t>(tokens * shape.out_features));
  {
    const nb::gil_scoped_release release;
    const elutq::KernelTable& kernels = elutq::select_kernels(isa);
    elutq::ThreadPool pool(threads);
    elutq::AlignedBuffer<uint8_t> packed(static_cast<size_t>(kernels.packed_bytes(shape)));
    pool.run_ranges(shape.out_features, kernels.row_tile,
                    [&](int64_t begin, int64_t end) { kernels.pack(matrix, begin, end, packed.data()); });
    if (exact) {
      pool.run_ranges(shape.out_features, kernels.row_tile, [&](int64_t begin, int64_t end) {
        kernels.matmul_exact(shape, packed.data(), x.data(), in_features, tokens, begin, end, y.get(),
                             shape.out_features);
      });
    } else {
      elutq::AlignedBuffer<uint8_t> entries(static_cast<size_t>(tokens * shape.slots() * 16));
      std::vector<float> segment_values(static_cast<size_t>(2 * tokens * shape.segments()));
      std::vector<elutq::TableView> tables;
      for (int64_t t = 0; t < tokens; ++t) {
        float* values = segment_values.data() + 2 * t * shape.segments();
        tables.push_back({entries.data() + t * shape.slots() * 16, values, values + shape.segments()});
        kernels.build_tables(x.data() + t * in_features, in_features, shape.segment_size(), tables.back());
      }
      pool.run_ranges(shape.out_features, kernels.row_tile, [&](int64_t begin, int64_t end) {
        kernels.matmul(shape, packed.data(), tables.data(), tokens, begin, end, y.get(), shape.out_features);
      });
    }
  }
  float* values = y.release();
  const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Matrix(values, {static_cast<size_t>(tokens), static_cast<size_t>(shape.out_features)}, owner);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const std::string_view isa : elutq::available_isas()) names.emplace_back(isa);
        return names;
      },
      "Instruction sets this machine can run, slowest first.");
  m.def("cpu_model_name", &elutq::cpu_model_name, "Marketing name of the CPU, or 'unknown'.");
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes, int passes) {
        const nb::gil_scoped_release release;
        elutq::ThreadPool pool(threads);
        return elutq::read_bandwidth(pool, bytes, passes) / 1e9;
      },
      "threads"_a, "bytes"_a = int64_t{1} << 30, "passes"_a = 5,
      "GB/s at which `threads` threads read `bytes` bytes of memory, best of `passes`.");
  m.def("hlq_linear", &hlq_linear, "isa"_a, "planes"_a, "scales"_a, "zeros"_a, "in_features"_a, "group_size"_a, "x"_a,
        "threads"_a = 1, "exact"_a = false,
        "x [tokens, in_features] times the transposed HLQ matrix (planes as on disk; scales and zeros as fp16 bits in\n"
        "uint16) -> fp32 [tokens, out_features], on the named instruction set ('' for the fastest). exact: from fp32\n"
        "activations instead of int8 tables.");
}
