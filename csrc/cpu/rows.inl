// Existing logits, row by row (logits_logps): one read in the forward, one read and one write in the backward.

// 2⁻⁵⁸·Σ exp(z_j − shift) = 2**-58 * sum(exp(z_j - shift)) over all columns but the target, z = logit/temperature;
// online: sum(exp(z_j - maximum)), with a running maximum.
template <bool BF16>
void sum_row(const void* data, int64_t n, int64_t target, const Reciprocal& temperature, float shift, bool online,
             double* sum, double* maximum) {
  constexpr int64_t PART = 256;
  double total = 0.0, top = -INFINITY;
  bool no_number = false;
  for (int64_t start = 0; start < n; start += PART) {
    int64_t count = smaller(PART, n - start);
    float z[PART], e[PART];
    for (int64_t j = 0; j < count; j++)
      z[j] = divided(BF16 ? float_of_bf16(((const uint16_t*)data)[start + j]) : ((const float*)data)[start + j],
                     temperature);
    if (target >= start && target < start + count) z[target - start] = -INFINITY;

    double part_shift = shift;
    if (online) {
      float largest = -INFINITY;
      for (int64_t j = 0; j < count; j++) largest = z[j] > largest ? z[j] : largest, no_number |= z[j] != z[j];
      if (largest == -INFINITY) continue;
      part_shift = largest;
    }

    float by = float(part_shift), part = 0.0f;
    for (int64_t j = 0; j < count; j++) e[j] = online ? exp_of(z[j] - by) : exp_shifted(z[j] - by);
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < count; j++) part += e[j];

    if (!online) {
      total += part;
    } else if (part_shift > top) {
      total = total * exp(top - part_shift) + part;
      top = part_shift;
    } else {
      total += part * exp(part_shift - top);
    }
  }
  *sum = no_number ? NAN : total;
  *maximum = online ? top : double(shift);
}

inline void row_sum(const Matrix& logits, int64_t row, int64_t target, const Reciprocal& temperature, float shift,
                    bool online, double* sum, double* maximum) {
  if (logits.bf16)
    sum_row<true>((const uint16_t*)logits.data + row * logits.stride, logits.columns, target, temperature, shift,
                  online, sum, maximum);
  else
    sum_row<false>((const float*)logits.data + row * logits.stride, logits.columns, target, temperature, shift, online,
                   sum, maximum);
}

// to_j = −g/temperature·p_j, at the target `at_target`; `to` may be the row itself.
inline void row_gradient(const Matrix& logits, int64_t row, int64_t target, const Reciprocal& temperature, double lse,
                         float g, float at_target, void* to) {
  float rounded = float(lse);
  float by = -g * temperature.high * float(exp(rounded - lse));  // puts back what rounding the logsumexp lost
  int64_t n = logits.columns;
  if (logits.bf16) {
    auto* from = (const uint16_t*)logits.data + row * logits.stride;
    auto* out = (uint16_t*)to;
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
      out[j] = bf16_of_float(by * exp_of(divided(float_of_bf16(from[j]), temperature) - rounded));
    out[target] = bf16_of_float(at_target);
  } else {
    auto* from = (const float*)logits.data + row * logits.stride;
    auto* out = (float*)to;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = by * exp_of(divided(from[j], temperature) - rounded);
    out[target] = at_target;
  }
}
