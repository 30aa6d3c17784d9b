// The arithmetic of one logit and of one row, shared by the CPU kernels and the CUDA kernels, which therefore run the
// same lines. The compiler vectorises loops over these functions: no branches, no library calls, no tables.
//
// Exp-direct (docs/architecture.md, "The native backend"): z is the transformed logit, y the target's column, and k a
// number of the row, at first the target's logit z_y.
//
//     1. E_j = 2⁻⁵⁸·exp(z_j − k) = 2**-58 * exp(z_j - k)         for every column j but the target    exp_shifted
//     2. o = Σ E_j
//     3. logp = −log(1 + 2⁵⁸·o·e^(k − z_y)) = -log1p(2**58 * o * exp(k - z_y))                        row_result
//     4. if o is above LARGEST_SUM: once more, with k = logsumexp                                     out_of_range
//     5. backward: S_j = E_j·c_j with c = dz/da, S_y = 0, and one factor r per row                    gradient_factor
//     6. the target's own coefficient, which is never rounded to bfloat16: g·gain·(1 − p)·c           target_factor
//
// Leaving the target out of the sum keeps both ends exact: 1 − p_y comes from o, not from a difference. The power of 2
// makes room for unlikely targets. It is added to the exponent's bits: a larger k instead would round z − k.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SDPO_HD __host__ __device__ __forceinline__
#define SDPO_HD_MEMBER __host__ __device__ __forceinline__
#else
#define SDPO_HD static inline __attribute__((always_inline))  // never shared by files compiled for different chips
#define SDPO_HD_MEMBER inline __attribute__((always_inline))
#endif

namespace sdpo {

constexpr int SHIFT_BITS = 58;
constexpr double SHIFT = SHIFT_BITS * 0.6931471805599453;  // 58·ln 2 = 58 * log(2) = 40.2

// Above it (log-prob below about −86) a row is recomputed with k = logsumexp. Up to 1e30 float would still hold S, but
// r ⊙ X, its counterpart, would underflow for small coefficients.
constexpr double LARGEST_SUM = 1e20;

// z = softcap·tanh(scale·a/softcap)/temperature, or scale·a/temperature; softcap 0 means none.
struct Head {
  float before;  // the factor of a: scale/softcap, or scale/temperature
  float after;   // the factor of tanh: softcap/temperature
  bool capped;
  double gain;  // scale/temperature, dz/da where tanh' is 1
};

SDPO_HD Head make_head(double scale, double softcap, double temperature) {
  if (softcap > 0) return {float(scale / softcap), float(softcap / temperature), true, scale / temperature};
  return {float(scale / temperature), 1.0f, false, scale / temperature};
}

SDPO_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SDPO_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Splits e^x: with x = n·ln 2 + r, |r| ≤ ln 2 / 2, it returns expm1(r) = e^r − 1 and stores 2**(n - less), for n − less
// in −126 … 127.
SDPO_HD float exp_parts(float x, int less, float* power) {
  const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to the nearest integer and leaves that in the low bits
  float shifted = x * 1.44269504088896341f + magic;
  float n = shifted - magic;
  *power = float_of_bits((bits_of_float(shifted) << 23) + (uint32_t(127 - less) << 23));

  float r = x - n * 0.693359375f;  // ln 2 in two parts (Cephes), so that r keeps all its bits
  r = r - n * -2.12194440e-4f;

  // the polynomial of Cephes' expf
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}

// exp(x) to 1 ulp; 0 below −87.3, inf above 88.3, NaN for NaN.
SDPO_HD float exp_of(float x) {
  float power;
  float y = exp_parts(x, 0, &power);
  y = power + power * y;
  y = x < -87.3f ? 0.0f : y;
  return x > 88.3f ? float_of_bits(0x7f800000u) : y;
}

// 2⁻⁵⁸·e^x = 2**-58 * exp(x); 0 below −47.1, inf above 128.5, NaN for NaN.
SDPO_HD float exp_shifted(float x) {
  float power;
  float y = exp_parts(x, SHIFT_BITS, &power);
  y = power + power * y;
  y = x < -47.1f ? 0.0f : y;
  return x > 128.5f ? float_of_bits(0x7f800000u) : y;
}

// expm1(x) = e^x − 1 for x ≤ 0, with all its bits near 0.
SDPO_HD float exp_minus_one(float x) {
  float power;
  float y = exp_parts(x, 0, &power);
  y = (power - 1.0f) + power * y;
  return x < -87.3f ? -1.0f : y;
}

SDPO_HD float absolute(float x) { return float_of_bits(bits_of_float(x) & 0x7fffffffu); }
SDPO_HD float with_sign_of(float x, float sign) {
  return float_of_bits(bits_of_float(x) | (bits_of_float(sign) & 0x80000000u));
}

// tanh(u) and 1 − tanh²(u) = 1 - tanh(u)**2, both without cancellation: with q = exp(-2 * |u|),
// tanh = (1 − q)/(1 + q) and slope = 4q/(1 + q)².
SDPO_HD float tanh_and_slope(float u, float* slope) {
  float m = exp_minus_one(-2.0f * absolute(u));  // q − 1
  float inverse = 1.0f / (2.0f + m);
  *slope = 4.0f * (1.0f + m) * inverse * inverse;
  return with_sign_of(-m * inverse, u);
}

// The logit z of a = x·w + b, and dz/da up to the factor `gain`.
SDPO_HD float logit(const Head& head, float a, float* slope) {
  if (!head.capped) {
    *slope = 1.0f;
    return a * head.before;
  }
  return tanh_and_slope(a * head.before, slope) * head.after;
}

// bfloat16 is the upper half of a float; rounds to nearest even, NaN stays NaN.
SDPO_HD uint16_t bf16_of_float(float value) {
  uint32_t bits = bits_of_float(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value == value ? rounded : 0x7fc0u);
}

SDPO_HD float float_of_bf16(uint16_t value) { return float_of_bits(uint32_t(value) << 16); }

// 1/temperature in two floats, so that z = logit/temperature is rounded once.
struct Reciprocal {
  float high, low;
};

SDPO_HD Reciprocal reciprocal(double temperature) {
  float high = float(1.0 / temperature);
  return {high, float(1.0 / temperature - high)};
}

// An infinite logit is clamped in the second product: inf * 0 and inf - inf are NaN.
SDPO_HD float divided(float logit, const Reciprocal& by) {
  const float largest = 3.402823466e38f;
  float finite = logit > largest ? largest : logit;
  finite = finite < -largest ? -largest : finite;
  return logit * by.high + finite * by.low;
}

// --- a row, in double: the cost of N numbers is negligible next to N×V ---

// The same transform in double, for the target's logit.
SDPO_HD double logit_double(const Head& head, double softcap, double temperature, double a, double* slope) {
  if (!head.capped) {
    *slope = 1.0;
    return a * head.gain;
  }
  double u = a * head.gain * temperature / softcap;
  double q = exp(-2.0 * fabs(u));
  *slope = 4.0 * q / ((1.0 + q) * (1.0 + q));
  return softcap / temperature * tanh(u);
}

// logp from the target's logit and the logsumexp of all other columns: −log(1 + e^(rest − target)), that is
// -log1p(exp(rest - target)), without overflow.
SDPO_HD double logp_of(double target, double rest) {
  double d = rest - target;
  return d <= 0 ? -log1p(exp(d)) : -d - log1p(exp(-d));
}

struct RowResult {
  double logp, lse;
};

// A target logit of −∞ (probability 0) gives the logsumexp of the rest; one of +∞ gives NaN.
SDPO_HD RowResult row_result(double target, double rest) {
  double logp = target == INFINITY ? NAN : logp_of(target, rest);
  return {logp, target == -INFINITY ? rest : target - logp};
}

// The logsumexp of all other columns from o = 2⁻⁵⁸·Σ exp(z − k) = 2**-58 * sum(exp(z - k)).
SDPO_HD double rest_of_sum(double sum, double k) { return log(sum) + k + SHIFT; }

// Whether a row must be recomputed with k = logsumexp. NaN is not overflow.
SDPO_HD bool out_of_range(double sum, double target) { return sum > LARGEST_SUM || fabs(target) == double(INFINITY); }

// o and k of a row that is recomputed, from the log-sum of the slice's columns; relative to 0 if that is no number. If
// all of them are −∞, k is below any logsumexp: exp(k − lse), which multiplies their S of 0, must not be infinite.
struct SliceRow {
  double sum;
  float shift;
};

SDPO_HD SliceRow slice_row(double rest) {
  float shift = fabs(rest) < double(INFINITY) ? float(rest) : 0.0f;
  if (rest == -double(INFINITY)) shift = -1e30f;
  return {exp(rest - shift - SHIFT), shift};
}

// dz/da at the target up to `gain`, from z_y.
SDPO_HD double slope_at(const Head& head, double softcap, double temperature, double z) {
  if (!head.capped) return 1.0;
  double tanh_u = z * temperature / softcap, slope = (1.0 - tanh_u) * (1.0 + tanh_u);
  return slope > 0.0 ? slope : 0.0;
}

// dL/da at the target, g·gain·(1 − p)·c, with 1 − p = -expm1(logp).
SDPO_HD float target_factor(double grad, double gain, double logp, double slope) {
  return float(grad * gain * -expm1(logp) * slope);
}

// r, the factor of a row of S in the backward: −g·gain/(o + 2⁻⁵⁸·e^(z_y − k)) = -g * gain * exp(k - lse + SHIFT).
SDPO_HD float gradient_factor(double grad, double gain, double k, double lse) {
  return float(-grad * gain * exp(k - lse + SHIFT));
}

// A row's k and r in a backward that recomputes all of S.
struct RowFactor {
  float shift, r;
};

// Moves k by at most ln 2 / 2 so that r is a power of 2: r ⊙ X in bfloat16 is exact then, and only S is rounded.
SDPO_HD RowFactor exact_factor(double k, float r) {
  if (!(absolute(r) > 1e-30f && absolute(r) < 1e30f)) return {float(k), r};
  const uint32_t up_from_sqrt_2 = 0x800000u - 0x3504f3u;  // mantissas from √2 on round up to the next power
  float power = float_of_bits((bits_of_float(r) + up_from_sqrt_2) & 0xff800000u);
  return {float(k + log(double(power) / r)), power};
}

// d logp / d hidden = of_sum·Σ_{j ≠ y} S_j W_j + of_target·W[y].
struct DirectionFactors {
  float of_sum, of_target;
};

SDPO_HD DirectionFactors direction_factors(double gain, double logp, double lse, double k, double slope) {
  return {float(-gain * exp(k - lse + SHIFT)), float(gain * -expm1(logp) * slope)};
}

}  // namespace sdpo
