// Sixteen-lane building blocks on top of an instruction set's `Floats` (the list of what it must offer is in
// kernels.inl.h).

namespace elutq {
namespace {

constexpr int kLanes = 16;

ELUTQ_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ELUTQ_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/// First `count` < 16 values, the other lanes zero.
ELUTQ_INLINE Floats load_part(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}

ELUTQ_INLINE void store_part(Floats value, float* to, int64_t count) {
  float lanes[kLanes];
  store(value, lanes);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(float));
}

/// Calls step(i, load, store) for all runs of 16 elements and then for the shorter tail; `load` and `store` take the
/// array whose elements i.. are meant.
template <typename Step>
ELUTQ_INLINE void for_each_run(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    step([i](const float* from) { return load(from + i); }, [i](Floats value, float* to) { store(value, to + i); });
  }
  if (i < count) {
    const int64_t left = count - i;
    step([i, left](const float* from) { return load_part(from + i, left); },
         [i, left](Floats value, float* to) { store_part(value, to + i, left); });
  }
}

/// e^x within 2 ulp for x in [-87, 88], clamped outside; NaN stays NaN.
ELUTQ_INLINE Floats exp(Floats x) {
  x = min(splat(88.0f), max(splat(-87.0f), x));
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  const Floats shift = splat(0x1.8p23f);
  const Floats shifted = fma(x, splat(1.44269504f), shift);
  const Floats n = shifted - shift;
  Floats r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return scale_by_power(p, shifted);
}

}  // namespace
}  // namespace elutq
