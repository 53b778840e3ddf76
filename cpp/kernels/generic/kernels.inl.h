// All algorithms, for the instruction set of the file that includes this one, which has defined in the same unnamed
// namespace:
//
//   Floats                        16 floats, zero when default-made, with + - * / and
//   zeros() splat(f) load(p) store(v, p) load_half(p) load_bfloat16(p) store_half(v, p)      any alignment
//   load_int8(p) load_uint8(p)    16 bytes, signed and unsigned
//   splat_half(p)                 the fp16 at p in every lane
//   from_bits(b)                  lane i = bit i of b, as 0.0 or 1.0
//   fma(a, b, c)                  a * b + c, rounded once
//   abs(v) max(a, b) min(a, b)    b when either is NaN
//   reduce_add(v) reduce_max(v)   lane i + 8 onto i, i + 4, i + 2, i + 1
//   swap_neighbors(v) swap_pairs(v)   lane i takes lane i ^ 1, i ^ 2
//   store_low_bytes(v, p)         the lowest byte of each lane's bit pattern
//   scale_by_power(v, n)          v with the bit pattern of n, shifted left by 23, added to its own
//   square_root(f)                of one float
//   kDenseRows, kDenseTokens      block of outputs whose sums fit the registers
//   kAttentionRuns                vectors of keys or values whose sums for four rows fit the registers: 1, 2 or 4
//   kMostTokens[bits]             most tokens per pass whose integer sums fit the registers: 1, 2, 4, 6 or 8
//   kManyTokens[bits]             so many and more go through many_tokens.inl.h; 0: none do
//   kFetches                      whether weights are fetched ahead (matmul.inl.h)
//   Lookup                        by including byte_rows.inl.h or quad_slots.inl.h
//
// Everything is in unnamed namespaces and no template or inline function of the standard library is used: the linker
// may keep any one copy of such a function, and it must not be one with instructions the machine lacks.

#include "kernels/generic/floats.inl.h"
//
#include "kernels/generic/packed.inl.h"
//
#include "kernels/generic/attention.inl.h"
#include "kernels/generic/dense.inl.h"
#include "kernels/generic/segment.inl.h"
#include "kernels/generic/tables.inl.h"
#include "kernels/generic/vectors.inl.h"
//
#include "kernels/generic/few_tokens.inl.h"
#include "kernels/generic/many_tokens.inl.h"
//
#include "kernels/generic/matmul.inl.h"

namespace elutq {
namespace {

constexpr KernelTable make_table(std::string_view isa) {
  return {
      .isa = isa,
      .row_tile = kTileRows,
      .row_panel = kPanelRows,
      .packed_bytes = packed_bytes,
      .pack = pack,
      .unpack_row = unpack_row,
      .build_tables = build_tables,
      .matmul = matmul,
      .matmul_exact = matmul_exact,
      .matmul_dense = matmul_dense,
      .to_float = to_float,
      .to_half = to_half,
      .rms_norm = rms_norm,
      .rope = rope,
      .add = add,
      .add_scaled = add_scaled,
      .softmax = softmax,
      .silu_mul = silu_mul,
      .store_kv = store_kv,
      .attention = attention,
      .merge_attention = merge_attention,
  };
}

}  // namespace
}  // namespace elutq
