// Elementwise functions and norms.

namespace elutq {
namespace {

void to_half(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_half(load(from + i), to + i);
  if (i < count) {
    uint16_t halves[kLanes];
    store_half(load_part(from + i, count - i), halves);
    std::memcpy(to + i, halves, static_cast<size_t>(count - i) * sizeof(uint16_t));
  }
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
  Floats squares = zeros();
  for_each_run(count, [&](auto get, auto) { squares = fma(get(x), get(x), squares); });
  const float mean = reduce_add(squares) / static_cast<float>(count);
  const Floats inverse = splat(1.0f / square_root(mean + eps));
  for_each_run(count, [&](auto get, auto put) { put(get(x) * inverse * get(weight), y); });
}

void rope(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < heads; ++h) {
    float* first = x + h * head_dim;
    float* second = first + half;
    for_each_run(half, [&](auto get, auto put) {
      const Floats a = get(first);
      const Floats b = get(second);
      put(a * get(cos) - b * get(sin), first);
      put(b * get(cos) + a * get(sin), second);
    });
  }
}

void add(const float* x, int64_t count, float* y) {
  for_each_run(count, [&](auto get, auto put) { put(get(y) + get(x), y); });
}

void add_scaled(const float* x, float scale, int64_t count, float* y) {
  for_each_run(count, [&](auto get, auto put) { put(fma(splat(scale), get(x), get(y)), y); });
}

void softmax(float* x, int64_t count) {
  float most;
  float total;
  softmax_weights(x, count, most, total);
  const Floats inverse = splat(1.0f / total);
  for_each_run(count, [&](auto get, auto put) { put(get(x) * inverse, x); });
}

void silu_mul(const float* gate, const float* up, int64_t count, float* y) {
  for_each_run(count, [&](auto get, auto put) {
    const Floats g = get(gate);
    put(g / (splat(1.0f) + exp(zeros() - g)) * get(up), y);
  });
}

}  // namespace
}  // namespace elutq
