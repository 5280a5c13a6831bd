// The momentum update of weights whose float32 average is kept as two halves of 16 bits.
#include "device.cuh"
#include "selective.h"

namespace ilvr {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerThread = 16;

__global__ void __launch_bounds__(kThreads) follow_kernel(Momentum problem) {
  float behind = 0, length = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < problem.n; i += step) {
    const uint32_t before = (uint32_t{problem.upper[i]} << 16) + static_cast<uint32_t>(problem.lower[i]);
    const float student = problem.student[i];
    const float average = fmaf(problem.weight, student - __uint_as_float(before), __uint_as_float(before));
    // one NaN for all: rounding up the largest, which is what the hardware makes, would wrap to a zero
    const uint32_t bits = isnan(average) ? 0x7fc00000u : __float_as_uint(average), upper = (bits + 0x8000u) >> 16;
    problem.upper[i] = static_cast<uint16_t>(upper);
    problem.lower[i] = static_cast<int16_t>(bits - (upper << 16));
    behind += (average - student) * (average - student);
    length += student * student;
  }
  behind = block_sum<kThreads>(behind);
  length = block_sum<kThreads>(length);
  if (threadIdx.x == 0) {
    atomicAdd(&problem.sums[0], static_cast<double>(behind));
    atomicAdd(&problem.sums[1], static_cast<double>(length));
  }
}

}  // namespace

cudaError_t ema_update(const Momentum& problem, cudaStream_t stream) {
  const int64_t blocks = (problem.n + kThreads * kPerThread - 1) / (kThreads * kPerThread);
  if (blocks > 0) follow_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(problem);
  return cudaGetLastError();
}

}  // namespace ilvr
