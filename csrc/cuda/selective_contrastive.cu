// Forward: label candidates, measure slots, walk the tiles with an online log-sum-exp, merge what the walkers saw.
// Backward: for each chunk of candidates form the tiles again, write softmax weights, multiply them with the candidates;
// then add the target's share and project out the direction of the prediction.
#include <algorithm>
#include <cmath>

#include "selective.h"
#include "tile.cuh"

namespace ilvr {
namespace {

constexpr int kSlotBlock = 128, kProjectBlock = 1024;
constexpr int64_t kWeights = 1 << 23;  // in memory at one time, unless there are thousands of slots
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Softmax weights of fp16 are kept times this: a millionth would be below fp16's smallest normal number.
template <class T>
constexpr float kWeightScale = __is_same(T, __half) ? 32768.0f : 1.0f;

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

__global__ void label_kernel(Contrastive problem) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, M = problem.M;
  const int64_t* offsets = problem.offsets;
  if (i == 0) ILVR_DEVICE_CHECK(offsets[0] == 0 && offsets[M] == problem.N, "candidate_offsets");
  if (i < M) ILVR_DEVICE_CHECK(offsets[i] <= offsets[i + 1], "candidate_offsets");
  if (i < problem.N) problem.rows[i] = static_cast<int32_t>(segment_of(i, offsets, M));
}

// The target of a slot with its noise; 0 where it has none.
template <class T>
__device__ float target_at(const Contrastive& problem, int64_t target, int64_t s, int64_t d) {
  if (target < 0) return 0;
  const float feature = to_float(static_cast<const T*>(problem.candidates)[target * problem.D + d]);
  return problem.noise ? feature + problem.noise[s * problem.D + d] : feature;
}

// One block a slot; all blocks together mark the selected candidates.
template <class T>
__global__ __launch_bounds__(kSlotBlock) void measure_kernel(Contrastive problem, const int64_t* selected,
                                                            int64_t num_selected) {
  const int64_t s = blockIdx.x, D = problem.D;
  for (int64_t i = s * kSlotBlock + threadIdx.x; i < num_selected; i += gridDim.x * int64_t{kSlotBlock}) {
    const int64_t row = selected[i];
    ILVR_DEVICE_CHECK(row < problem.N, "selected");
    if (row < 0) continue;
    const int32_t segment = problem.rows[row];
    if (segment >= 0) problem.rows[row] = ~segment;
  }
  if (s >= problem.S) return;
  const int64_t target = problem.target_index[s], segment = problem.segment_of_slot[s];
  ILVR_DEVICE_CHECK(target < problem.N, "target_index");
  ILVR_DEVICE_CHECK(segment >= 0 && segment < problem.M, "segment_of_slot");
  const T* z = static_cast<const T*>(problem.prediction) + s * D;
  float squares = 0, target_squares = 0, dot = 0;
  for (int64_t d = threadIdx.x; d < D; d += kSlotBlock) {
    const float x = to_float(z[d]), aim = target_at<T>(problem, target, s, d);
    squares = fmaf(x, x, squares);
    target_squares = fmaf(aim, aim, target_squares);
    dot = fmaf(x, aim, dot);
  }
  squares = block_sum<kSlotBlock>(squares);
  target_squares = block_sum<kSlotBlock>(target_squares);
  dot = block_sum<kSlotBlock>(dot);
  if (threadIdx.x == 0) {
    const float inverse = inverse_length(squares), target_inverse = inverse_length(target_squares);
    problem.slots[s] = {inverse, target_inverse, dot * inverse * target_inverse, INFINITY};
  }
}

// Of a tile of slots: what masks and scales need, and which candidates any of them can have as a negative.
struct SlotTile {
  int segment[kSlots];
  int64_t sample[kSlots];
  float scale[kSlots];    // dot with a unit candidate to logit / ln 2
  float log_sum[kSlots];  // over ln 2; inf where there is no loss
  unsigned long long begin, end;

  __device__ void read(const Contrastive& problem, int64_t first, int64_t chunk_begin, int64_t chunk_end) {
    if (threadIdx.x == 0) begin = chunk_end, end = chunk_begin;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kSlots; i += kThreads) {
      const int64_t s = first + i;
      const bool exists = s < problem.S;
      const int64_t m = exists ? problem.segment_of_slot[s] : -1;
      const float4 slot = exists ? problem.slots[s] : float4{0, 0, 0, INFINITY};
      segment[i] = static_cast<int>(m);
      sample[i] = exists && problem.samples ? problem.samples[m] : 0;
      scale[i] = slot.x * problem.inverse_temperature * kLog2E;
      log_sum[i] = (slot.z * problem.inverse_temperature + slot.w) * kLog2E;
      if (exists && problem.target_index[s] >= 0) {
        const int64_t low = max(problem.samples ? 0 : problem.offsets[m], chunk_begin);
        const int64_t high = min(problem.samples ? problem.N : problem.offsets[m + 1], chunk_end);
        if (low < high) {
          atomicMin(&begin, static_cast<unsigned long long>(low));
          atomicMax(&end, static_cast<unsigned long long>(high));
        }
      }
    }
    __syncthreads();
  }
};

// Of a tile of candidates.
struct CandidateTile {
  int segment[kColumns];  // complement where selected, and so equal to no slot's
  int64_t sample[kColumns];
  float inverse[kColumns];  // squared lengths at first

  __device__ void read(const Contrastive& problem, int64_t first) {
    for (int i = threadIdx.x; i < kColumns && first + i < problem.N; i += kThreads) {
      const int row = problem.rows[first + i];
      segment[i] = row;
      sample[i] = problem.samples ? problem.samples[row < 0 ? ~row : row] : 0;
    }
  }

  template <class Product>
  __device__ void measure(const typename Product::Squares& squares, const Lane& at) {
    Product::store_squares(squares, at, inverse);
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns; i += kThreads) inverse[i] = inverse_length(inverse[i]);
    __syncthreads();
  }
};

// Forward: kWeigh false, writes partial [walkers, S]. Backward: kWeigh true, writes weights [S, chunk] and, for fp16,
// inverse [chunk]. Blocks: tiles of slots x walkers, which take turns at the tiles of candidates.
template <class T, bool kWeigh>
__global__ __launch_bounds__(kThreads, kBlocks) void walk_kernel(Contrastive problem, int64_t chunk_begin,
                                                                int64_t chunk, float2* partial, T* weights,
                                                                float* inverses) {
  extern __shared__ __align__(128) char stages[];
  __shared__ SlotTile slots;
  __shared__ CandidateTile candidates;
  const Lane at;
  const int64_t first_slot = blockIdx.x * int64_t{kSlots}, D = problem.D;
  const Matrix<T> z(problem.prediction, problem.S, D, D), c(problem.candidates, problem.N, D, D);
  slots.read(problem, first_slot, chunk_begin, min(chunk_begin + chunk, problem.N));
  float top[kI][2], sum[kI][2];
  for (int i = 0; i < kI; ++i)
    for (int h = 0; h < 2; ++h) top[i][h] = -INFINITY, sum[i][h] = 0;

  const int64_t end = slots.end;
  for (int64_t tile = slots.begin / kColumns + blockIdx.y; tile * kColumns < end; tile += gridDim.y) {
    const int64_t first = tile * kColumns;
    const int exist = static_cast<int>(min(problem.N - first, int64_t{kColumns}));
    Results results = {};
    typename Product<T>::Squares squares = {};
    candidates.read(problem, first);
    pipeline(
        stages, (D + kDepth<T> - 1) / kDepth<T>,
        [&](int64_t step, char* stage) {
          copy_tile<kSlots>(stage, z, first_slot, step * kDepth<T>);
          copy_tile<kColumns>(stage + kSlots * kRowBytes, c, first, step * kDepth<T>);
        },
        [&](int64_t, const char* stage) {
          Product<T>::dots(stage, stage + kSlots * kRowBytes, at, results, squares);
        });
    candidates.measure<Product<T>>(squares, at);

#pragma unroll
    for (int part = 0; part < 2 * kI; ++part) {
      const int i = part / 2, h = part % 2, row = at.row(i, h), segment = slots.segment[row];
      const int64_t sample = slots.sample[row];
      const float scale = slots.scale[row];
      float logit[2 * kJ], highest = top[i][h];
#pragma unroll
      for (int j = 0; j < 2 * kJ; ++j) {
        const int column = at.column(j / 2) + j % 2;
        const bool negative = (candidates.segment[column] == segment) | (candidates.sample[column] != sample);
        const float cosine = results[i][j / 2][2 * h + j % 2] * candidates.inverse[column];
        logit[j] = negative & (column < exist) ? cosine * scale : -INFINITY;
        highest = fmaxf(highest, logit[j]);
      }
      if constexpr (kWeigh) {
        T* out = weights + (first_slot + row) * chunk + first - chunk_begin;
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          float w[2];
          for (int e = 0; e < 2; ++e) {
            w[e] = power_of_2(logit[2 * j + e] - slots.log_sum[row]) * kWeightScale<T>;
            if (!__is_same(T, __half)) w[e] *= candidates.inverse[at.column(j) + e];
          }
          if (first_slot + row < problem.S) store_pair(out + at.column(j), w[0], w[1]);
        }
      } else if (highest > -INFINITY) {
        float fresh = 0;
#pragma unroll
        for (int j = 0; j < 2 * kJ; ++j) fresh += power_of_2(logit[j] - highest);
        sum[i][h] = fmaf(sum[i][h], power_of_2(top[i][h] - highest), fresh);
        top[i][h] = highest;
      }
    }
    if (kWeigh && __is_same(T, __half))
      for (int i = threadIdx.x; i < kColumns; i += kThreads) inverses[first - chunk_begin + i] = candidates.inverse[i];
    __syncthreads();
  }

  if constexpr (!kWeigh) {  // the four threads of a row, then the warps
    __shared__ float2 across[kWarpsAcross][kSlots];
    for (int i = 0; i < kI; ++i)
      for (int h = 0; h < 2; ++h) {
        float highest = top[i][h];
        for (int step = 1; step < 4; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, step));
        float total = top[i][h] > -INFINITY ? sum[i][h] * power_of_2(top[i][h] - highest) : 0;
        for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(kFullWarp, total, step);
        if (at.member == 0) across[at.across][at.row(i, h)] = {highest, total};
      }
    __syncthreads();
    for (int row = threadIdx.x; row < kSlots && first_slot + row < problem.S; row += kThreads) {
      float2 all = {-INFINITY, 0};
      for (int w = 0; w < kWarpsAcross; ++w) all.x = fmaxf(all.x, across[w][row].x);
      for (int w = 0; w < kWarpsAcross; ++w)
        if (across[w][row].y > 0) all.y += across[w][row].y * power_of_2(across[w][row].x - all.x);
      partial[blockIdx.y * problem.S + first_slot + row] = all;
    }
  }
}

// One warp a slot.
__global__ void finish_kernel(Contrastive problem, int64_t walkers, const float2* partial, float* alignment,
                              float* contrastive) {
  const int64_t s = blockIdx.x * int64_t{kSlotBlock / 32} + threadIdx.x / 32;
  if (s >= problem.S) return;
  const int lane = threadIdx.x % 32;
  const bool has_target = problem.target_index[s] >= 0;
  const float cosine = problem.slots[s].z, positive = cosine * problem.inverse_temperature * kLog2E;
  float highest = -INFINITY;
  for (int64_t w = lane; w < walkers; w += 32) highest = fmaxf(highest, partial[w * problem.S + s].x);
  for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, step));
  const bool has_loss = has_target && highest > -INFINITY;
  highest = fmaxf(highest, positive);
  float sum = 0;
  for (int64_t w = lane; w < walkers; w += 32) {
    const float2 part = partial[w * problem.S + s];
    if (part.y > 0) sum += part.y * power_of_2(part.x - highest);
  }
  sum = warp_sum(sum) + power_of_2(positive - highest);
  if (lane) return;
  alignment[s] = has_target ? 1 - cosine : 0;
  const float loss = (highest - positive + log2f(sum)) * kLn2;  // exact where the target dominates
  contrastive[s] = has_loss ? loss : 0;
  problem.slots[s].w = has_loss ? loss : INFINITY;
}

// pull [splits, S, D]: writes or adds weights . candidates of one chunk. Blocks: tiles of slots x of features x splits.
template <class T>
__global__ __launch_bounds__(kThreads, kBlocks) void pull_kernel(Contrastive problem, int64_t chunk_begin,
                                                                int64_t chunk, const T* weights,
                                                                const float* inverses, float* pull) {
  extern __shared__ __align__(128) char stages[];
  __shared__ SlotTile slots;
  const Lane at;
  const int64_t first_slot = blockIdx.x * int64_t{kSlots}, first_feature = blockIdx.y * int64_t{kColumns};
  const int64_t S = problem.S, D = problem.D;
  slots.read(problem, first_slot, chunk_begin, min(chunk_begin + chunk, problem.N));
  const Matrix<T> w(weights, S, chunk, chunk), c(problem.candidates, problem.N, D, D);
  const int64_t begin = slots.begin, end = slots.end, low = (begin - chunk_begin) / kDepth<T>;
  const int64_t steps = end > begin ? (end - chunk_begin + kDepth<T> - 1) / kDepth<T> - low : 0;
  const int64_t from = low + steps * blockIdx.z / gridDim.z, to = low + steps * (blockIdx.z + 1) / gridDim.z;
  Results results = {};
  pipeline(
      stages, to - from,
      [&](int64_t step, char* stage) {
        const int64_t place = (from + step) * kDepth<T>;
        copy_tile<kSlots>(stage, w, first_slot, place);
#pragma unroll
        for (int part = 0; part < kColumns / kDepth<T>; ++part)
          copy_tile<kDepth<T>>(stage + (kSlots + part * kDepth<T>) * kRowBytes, c, chunk_begin + place,
                               first_feature + part * kDepth<T>);
      },
      [&](int64_t step, const char* stage) {
        Product<T>::weighted(stage, stage + kSlots * kRowBytes, inverses + (from + step) * kDepth<T>, at, results);
      });
  const bool adds = chunk_begin > 0;
#pragma unroll
  for (int part = 0; part < 4 * kI * kJ; ++part) {
    const int i = part / 4 / kJ, j = part / 4 % kJ, h = part / 2 % 2, e = part % 2;
    const int64_t s = first_slot + at.row(i, h), d = first_feature + at.column(j) + e;
    float* out = pull + (blockIdx.z * S + s) * D + d;
    if (s < S && d < D) *out = (adds ? *out : 0) + results[i][j][2 * h + e];
  }
}

// One block a slot: the gradient of the unit prediction, then of the prediction.
template <class T>
__global__ __launch_bounds__(kProjectBlock) void project_kernel(Contrastive problem, Backward out, int64_t splits) {
  const int64_t s = blockIdx.x, S = problem.S, D = problem.D, target = problem.target_index[s];
  const float4 slot = problem.slots[s];
  const float scale = isinf(slot.w) ? 0 : out.grad_contrastive[s] * problem.inverse_temperature;
  const float along = scale * expm1f(-slot.w) - out.grad_alignment[s];
  const T* z = static_cast<const T*>(problem.prediction) + s * D;
  float* total = out.pull + s * D;
  float radial = 0;
  for (int64_t d = threadIdx.x; d < D; d += kProjectBlock) {
    float pull = 0;
    for (int64_t split = 0; split < splits; ++split) pull += out.pull[(split * S + s) * D + d];
    total[d] = along * slot.y * target_at<T>(problem, target, s, d) + scale / kWeightScale<T> * pull;
    radial = fmaf(total[d], to_float(z[d]) * slot.x, radial);
  }
  radial = block_sum<kProjectBlock>(radial);
  T* grad = static_cast<T*>(out.grad) + s * D;
  for (int64_t d = threadIdx.x; d < D; d += kProjectBlock)
    grad[d] = from_float<T>((total[d] - radial * slot.x * to_float(z[d])) * slot.x);
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

#define ILVR_RETURN_IF_ERROR(call) \
  if (const cudaError_t error = call; error != cudaSuccess) return error

template <class T>
cudaError_t forward(const Contrastive& problem, const Plan& plan, const Forward& out, cudaStream_t stream) {
  const int64_t labels = std::max<int64_t>({problem.N, problem.M, 1});
  label_kernel<<<static_cast<unsigned>(tiles_of(labels, 256)), 256, 0, stream>>>(problem);
  const auto blocks = static_cast<unsigned>(problem.S);
  measure_kernel<T><<<blocks, kSlotBlock, 0, stream>>>(problem, out.selected, out.num_selected);
  ILVR_RETURN_IF_ERROR(allow_shared(walk_kernel<T, false>));
  const dim3 grid(plan.slot_tiles, plan.walkers);
  walk_kernel<T, false><<<grid, kThreads, kSharedBytes, stream>>>(problem, 0, problem.N, out.partial, nullptr, nullptr);
  finish_kernel<<<static_cast<unsigned>(tiles_of(problem.S, kSlotBlock / 32)), kSlotBlock, 0, stream>>>(
      problem, plan.walkers, out.partial, out.alignment, out.contrastive);
  return cudaGetLastError();
}

template <class T>
cudaError_t backward(const Contrastive& problem, const Plan& plan, const Backward& out, cudaStream_t stream) {
  T* weights = static_cast<T*>(out.weights);
  ILVR_RETURN_IF_ERROR(allow_shared(walk_kernel<T, true>));
  ILVR_RETURN_IF_ERROR(allow_shared(pull_kernel<T>));
  const dim3 walk(plan.slot_tiles, plan.walkers);
  const dim3 pull(plan.slot_tiles, tiles_of(problem.D, kColumns), plan.splits);
  for (int64_t begin = 0; begin < problem.N; begin += plan.chunk) {
    walk_kernel<T, true><<<walk, kThreads, kSharedBytes, stream>>>(problem, begin, plan.chunk, nullptr, weights,
                                                                  out.inverse);
    pull_kernel<T><<<pull, kThreads, kSharedBytes, stream>>>(problem, begin, plan.chunk, weights, out.inverse,
                                                            out.pull);
  }
  project_kernel<T><<<static_cast<unsigned>(problem.S), kProjectBlock, 0, stream>>>(problem, out, plan.splits);
  return cudaGetLastError();
}

}  // namespace

Plan plan(const Contrastive& problem, int processors) {
  const int64_t resident = kBlocks * processors;
  Plan plan;
  plan.slot_tiles = std::max<int64_t>(1, tiles_of(problem.S, kSlots));
  const int64_t tiles = std::max<int64_t>(1, tiles_of(problem.N, kColumns));
  plan.walkers = std::clamp<int64_t>(resident / plan.slot_tiles, 1, tiles);
  const int64_t most = std::max<int64_t>(2048, kWeights / (plan.slot_tiles * kSlots));
  plan.chunk = std::min(most / kColumns, tiles) * kColumns;
  const int64_t blocks = plan.slot_tiles * tiles_of(problem.D, kColumns);
  plan.splits = std::clamp<int64_t>(resident / std::max<int64_t>(1, blocks), 1, tiles_of(plan.chunk, 2 * kColumns));
  return plan;
}

cudaError_t contrastive_forward(const Contrastive& problem, const Plan& plan, const Forward& out,
                                cudaStream_t stream) {
  switch (problem.type) {
    case Type::kFloat: return forward<float>(problem, plan, out, stream);
    case Type::kHalf: return forward<__half>(problem, plan, out, stream);
    case Type::kBFloat16: return forward<__nv_bfloat16>(problem, plan, out, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t contrastive_backward(const Contrastive& problem, const Plan& plan, const Backward& out,
                                 cudaStream_t stream) {
  switch (problem.type) {
    case Type::kFloat: return backward<float>(problem, plan, out, stream);
    case Type::kHalf: return backward<__half>(problem, plan, out, stream);
    case Type::kBFloat16: return backward<__nv_bfloat16>(problem, plan, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ilvr
