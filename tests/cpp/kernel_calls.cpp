/// kernel_calls ISA BITS PARAM_BITS TOKENS CALLS: multiplies a matrix of 256 x 1024, groups of 128, CALLS times. A
/// program whose instructions are counted: what it does besides is the same for any CALLS.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernel_cases.h"

using namespace elutq;
using namespace elutq::testing;

int main(int argc, char** argv) {
  const KernelTable* kernels = argc == 6 ? find_kernels(argv[1]) : nullptr;
  if (kernels == nullptr) {
    std::fprintf(stderr,
                 "usage: kernel_calls ISA BITS PARAM_BITS TOKENS CALLS, with an ISA that this machine can run\n");
    return 2;
  }
  const HlqShape shape = {.out_features = 256,
                          .in_features = 1024,
                          .bits = std::atoi(argv[2]),
                          .group_size = 128,
                          .param_bits = std::atoi(argv[3])};
  const int64_t tokens = std::atoi(argv[4]);
  const int calls = std::atoi(argv[5]);

  const HlqCase matrix(shape, 1);
  AlignedBuffer<uint8_t> packed(static_cast<size_t>(kernels->packed_bytes(shape)));
  kernels->pack(matrix.view(), 0, shape.out_features, packed.data());
  const std::vector<float> x = random_floats(shape.in_features, 2);
  std::vector<Tables> tables;
  std::vector<TableView> views;
  for (int64_t t = 0; t < tokens; ++t) {
    tables.emplace_back(shape);
    views.push_back(tables.back().view());
    kernels->build_tables(x.data(), shape.in_features, shape.segment_size(), views.back());
  }
  std::vector<float> y(static_cast<size_t>(tokens * shape.out_features));
  for (int i = 0; i < calls; ++i) {
    kernels->matmul(shape, packed.data(), views.data(), tokens, 0, shape.out_features, y.data(), shape.out_features);
  }
}
