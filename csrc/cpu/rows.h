// Arithmetic on rows of features, compiled for several x86 levels in one binary; the loader picks at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define ILVR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ILVR_CLONES
#endif

namespace ilvr {

// Sums are taken in float, for double in double.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A shorter vector counts as zero: its cosine with anything is 0.
constexpr double kEpsilon = 1e-8;

template <class Float>
Float inverse_length(Float squares) {
  const Float length = std::sqrt(squares);
  return length < kEpsilon ? Float(0) : 1 / length;
}

template <class Float>
struct Products {
  Float dot, squares;
};

// row . other and row . row. The order of summation does not depend on addresses: equal rows have equal sums.
template <class T, class U>
ILVR_CLONES Products<Sum<T>> products(const T* row, const U* other, int64_t size) {
  using Float = Sum<T>;
  constexpr int kLanes = 32;
  Float dots[kLanes] = {}, squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Float x = static_cast<Float>(row[i + lane]);
      dots[lane] += x * static_cast<Float>(other[i + lane]);
      squares[lane] += x * x;
    }
  for (int lane = 0; i < size; ++i, ++lane) {
    const Float x = static_cast<Float>(row[i]);
    dots[lane] += x * static_cast<Float>(other[i]);
    squares[lane] += x * x;
  }
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) dots[lane] += dots[lane + half], squares[lane] += squares[lane + half];
  return {dots[0], squares[0]};
}

template <class T>
ILVR_CLONES void widen(const T* row, Sum<T>* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<Sum<T>>(row[i]);
}

// exp for x <= 0 without a call, so that loops over it become vector code: 2^n times a polynomial, error below 2 ulp.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}
inline double exp_negative(double x) { return std::exp(x); }

}  // namespace ilvr
