#include "kernels/kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "kernels/bandwidth.h"

namespace nb = nanobind;
using namespace nb::literals;

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
}
