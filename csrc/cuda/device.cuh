// Small device functions that every kernel uses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

namespace ilvr {

// A bad value in an argument stops the program, also in builds with NDEBUG.
#define ILVR_DEVICE_CHECK(condition, argument)                                     \
  do {                                                                             \
    if (!(condition)) {                                                            \
      printf("ilvr_ds: bad value in %s: expected %s\n", argument, #condition);     \
      __trap();                                                                    \
    }                                                                              \
  } while (0)

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kEpsilon = 1e-8f;  // a shorter vector counts as zero: its cosine with anything is 0

__device__ inline float inverse_length(float squares) {
  const float length = sqrtf(squares);
  return length < kEpsilon ? 0.0f : 1.0f / length;
}

// 2^x to 2 ulp; 0 below 2^-126.
__device__ inline float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) { return x; }
template <>
__device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// Two numbers of a 32-bit word.
template <class T>
__device__ float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <class T>
__device__ uint32_t pack(float2 pair);
template <>
__device__ inline uint32_t pack<__half>(float2 pair) {
  const __half2 word = __float22half2_rn(pair);
  return *reinterpret_cast<const uint32_t*>(&word);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float2 pair) {
  const __nv_bfloat162 word = __float22bfloat162_rn(pair);
  return *reinterpret_cast<const uint32_t*>(&word);
}

template <class T>
__device__ void store_pair(T* out, float first, float second) {
  *reinterpret_cast<uint32_t*>(out) = pack<T>({first, second});
}
__device__ inline void store_pair(float* out, float first, float second) {
  *reinterpret_cast<float2*>(out) = {first, second};
}

template <class Value>
__device__ Value warp_sum(Value value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Sum over the block, for every thread. May be called repeatedly.
template <int kThreads>
__device__ float block_sum(float value) {
  __shared__ float parts[kThreads / 32];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) value += parts[warp];
  return value;
}

// The segment that holds a row: the last one with offsets[m] <= row.
__device__ inline int64_t segment_of(int64_t row, const int64_t* offsets, int64_t M) {
  int64_t low = 0, high = M;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

}  // namespace ilvr
