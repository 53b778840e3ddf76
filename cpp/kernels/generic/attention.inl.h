// Attention of the query heads that share one key-value head. Scores of all positions first, then one softmax over the
// scratch, then the values position by position: nothing depends on where one span ends and the next begins.

namespace elutq {
namespace {

template <typename Step>
ELUTQ_INLINE void for_each_half_run(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    step([i](const float* from) { return load(from + i); }, [i](const uint16_t* from) { return load_half(from + i); });
  }
  if (i < count) {
    const int64_t left = count - i;
    step([i, left](const float* from) { return load_part(from + i, left); },
         [i, left](const uint16_t* from) {
           uint16_t padded[kLanes] = {};
           std::memcpy(padded, from + i, static_cast<size_t>(left) * sizeof(uint16_t));
           return load_half(padded);
         });
  }
}

/// scores[h * total + j] = scale * q[h] . keys[j] for `heads` heads and `positions` positions.
template <int heads, int positions>
ELUTQ_INLINE void score_block(const float* q, int64_t head_dim, const uint16_t* keys, float scale, float* scores,
                              int64_t total) {
  Floats sums[heads][positions] = {};
  for_each_half_run(head_dim, [&](auto load_q, auto load_key) ELUTQ_FLAT {
    Floats k[positions];
    unroll<positions>([&](auto j) ELUTQ_FLAT { k[j] = load_key(keys + j * head_dim); });
    unroll<heads>([&](auto h) ELUTQ_FLAT {
      const Floats v = load_q(q + h * head_dim);
      unroll<positions>([&](auto j) ELUTQ_FLAT { sums[h][j] = fma(v, k[j], sums[h][j]); });
    });
  });
  for (int h = 0; h < heads; ++h) {
    for (int j = 0; j < positions; ++j) scores[h * total + j] = scale * reduce_add(sums[h][j]);
  }
}

template <int heads>
void score_span(const float* q, int64_t head_dim, const KvSpan& span, float scale, float* scores, int64_t total) {
  constexpr int kPositions = 4 / heads;
  int64_t j = 0;
  for (; j + kPositions <= span.length; j += kPositions) {
    score_block<heads, kPositions>(q, head_dim, span.keys + j * head_dim, scale, scores + j, total);
  }
  for (; j < span.length; ++j) {
    score_block<heads, 1>(q, head_dim, span.keys + j * head_dim, scale, scores + j, total);
  }
}

/// scores -> exp(scores - max); returns 1 / their sum.
float softmax_weights(float* scores, int64_t count) {
  Floats largest = splat(scores[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(largest, load(scores + i));
  float most = reduce_max(largest);
  for (; i < count; ++i) most = scores[i] > most ? scores[i] : most;

  const Floats shift = splat(most);
  Floats sum = zeros();
  for (i = 0; i + kLanes <= count; i += kLanes) {
    const Floats e = exp(load(scores + i) - shift);
    store(e, scores + i);
    sum = sum + e;
  }
  if (i < count) {
    store_part(exp(load_part(scores + i, count - i) - shift), scores + i, count - i);
    sum = sum + load_part(scores + i, count - i);
  }
  return 1.0f / reduce_add(sum);
}

/// out[h][d] = inverse[h] * sum_j scores[h][j] * values[j][d] for `heads` heads and `runs` runs of 16 columns from
/// `column` on; width < 16 when the one run is the tail.
template <int heads, int runs>
void weigh_values(const float* scores, int64_t total, const float* inverse, int64_t head_dim, const KvSpan* spans,
                  int64_t span_count, int64_t column, int64_t width, float* out) {
  Floats sums[heads][runs] = {};
  for (int64_t s = 0; s < span_count; ++s) {
    for (int64_t j = 0; j < spans[s].length; ++j) {
      const uint16_t* value = spans[s].values + j * head_dim + column;
      Floats v[runs];
      if (width == kLanes) {
        unroll<runs>([&](auto r) ELUTQ_FLAT { v[r] = load_half(value + r * kLanes); });
      } else {
        uint16_t padded[kLanes] = {};
        std::memcpy(padded, value, static_cast<size_t>(width) * sizeof(uint16_t));
        v[0] = load_half(padded);
      }
      unroll<heads>([&](auto h) ELUTQ_FLAT {
        const Floats weight = splat(scores[h * total + j]);
        unroll<runs>([&](auto r) ELUTQ_FLAT { sums[h][r] = fma(weight, v[r], sums[h][r]); });
      });
    }
    scores += spans[s].length;
  }
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < runs; ++r) {
      store_part(sums[h][r] * splat(inverse[h]), out + h * head_dim + column + r * kLanes, width);
    }
  }
}

template <int heads>
void attend(const float* q, int64_t head_dim, const KvSpan* spans, int64_t span_count, float scale, float* scores,
            int64_t total, float* out) {
  constexpr int kRuns = 4;
  int64_t position = 0;
  for (int64_t s = 0; s < span_count; ++s) {
    score_span<heads>(q, head_dim, spans[s], scale, scores + position, total);
    position += spans[s].length;
  }
  float inverse[heads];
  for (int h = 0; h < heads; ++h) inverse[h] = softmax_weights(scores + h * total, total);
  int64_t column = 0;
  for (; column + kRuns * kLanes <= head_dim; column += kRuns * kLanes) {
    weigh_values<heads, kRuns>(scores, total, inverse, head_dim, spans, span_count, column, kLanes, out);
  }
  for (; column < head_dim; column += kLanes) {
    const int64_t width = min_of(kLanes, head_dim - column);
    weigh_values<heads, 1>(scores, total, inverse, head_dim, spans, span_count, column, width, out);
  }
}

void attention(const float* q, int64_t heads, int64_t head_dim, const KvSpan* spans, int64_t span_count, float scale,
               float* scores, float* out) {
  int64_t total = 0;
  for (int64_t s = 0; s < span_count; ++s) total += spans[s].length;
  const auto take = [&](int64_t h, auto attend_block) {
    attend_block(q + h * head_dim, head_dim, spans, span_count, scale, scores + h * total, total, out + h * head_dim);
  };
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) take(h, attend<4>);
  for (; h + 2 <= heads; h += 2) take(h, attend<2>);
  if (h < heads) take(h, attend<1>);
}

}  // namespace
}  // namespace elutq
