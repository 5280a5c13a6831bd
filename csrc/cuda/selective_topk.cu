// Two launches: cosines, one warp a row, which reads the candidates once; then one block a segment for the rest, which
// is a few kilobytes.
#include "device.cuh"
#include "selective.h"

namespace ilvr {
namespace {

constexpr int kWarps = 8, kBlock = 32 * kWarps;
constexpr int kSelectBlock = 512, kSorted = 2048, kMost = kSorted / 2;

// dot, squares of the row and squares of the query, for one piece of 16 bytes.
template <class T>
__device__ void add_piece(const uint4& piece, const float* query, float3& sums) {
  constexpr int kNumbers = 16 / sizeof(T);
  float row[kNumbers], q[kNumbers];
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint4*>(row) = piece;
  } else {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
    for (int i = 0; i < 4; ++i) *reinterpret_cast<float2*>(row + 2 * i) = unpack<T>(words[i]);
  }
  for (int i = 0; i < kNumbers; i += 4)
    *reinterpret_cast<float4*>(q + i) = __ldg(reinterpret_cast<const float4*>(query + i));
  for (int i = 0; i < kNumbers; ++i) {
    sums.x = fmaf(row[i], q[i], sums.x);
    sums.y = fmaf(row[i], row[i], sums.y);
    sums.z = fmaf(q[i], q[i], sums.z);
  }
}

template <class T>
__global__ __launch_bounds__(kBlock) void cosine_kernel(TopK problem) {
  constexpr int kNumbers = 16 / sizeof(T), kUnroll = 4;
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, D = problem.D;
  if (n >= problem.N || (problem.pool && !problem.pool[n])) return;
  const T* row = static_cast<const T*>(problem.candidates) + n * D;
  const float* query = problem.query + segment_of(n, problem.offsets, problem.M) * D;
  float3 sums = {0, 0, 0};
  const bool aligned = D % kNumbers == 0 && reinterpret_cast<uintptr_t>(problem.candidates) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(problem.query) % 16 == 0;
  if (aligned) {
    const uint4* pieces = reinterpret_cast<const uint4*>(row);
    const int64_t count = D / kNumbers;
    int64_t i = lane;
    for (; i + 32 * (kUnroll - 1) < count; i += 32 * kUnroll) {
      uint4 piece[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) piece[u] = __ldcs(pieces + i + 32 * u);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add_piece<T>(piece[u], query + (i + 32 * u) * kNumbers, sums);
    }
    for (; i < count; i += 32) add_piece<T>(__ldcs(pieces + i), query + i * kNumbers, sums);
  } else {
    for (int64_t d = lane; d < D; d += 32) {
      const float x = to_float(row[d]), q = query[d];
      sums.x = fmaf(x, q, sums.x);
      sums.y = fmaf(x, x, sums.y);
      sums.z = fmaf(q, q, sums.z);
    }
  }
  const float dot = warp_sum(sums.x), squares = warp_sum(sums.y), query_squares = warp_sum(sums.z);
  if (lane == 0) problem.cosine[n] = dot * inverse_length(squares) * inverse_length(query_squares);
}

// Larger scores first, then lower places: unsigned keys in descending order, none of them 0.
__device__ uint64_t sort_key(float score, uint32_t place) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 is 0
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ascending) << 32 | ~place;
}

__device__ float score_of(uint64_t key) {
  const uint32_t ascending = key >> 32;
  return __uint_as_float(ascending & 0x80000000u ? ascending ^ 0x80000000u : ~ascending);
}

// Bitonic, descending; size is a power of two.
__device__ void sort_block(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int step = run / 2; step; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kSelectBlock) {
        const int low = 2 * step * (i / step) + i % step, high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  __syncthreads();
}

// A key of 0 stands for no candidate: one past the end, or one that is not in the pool.
__global__ __launch_bounds__(kSelectBlock) void select_kernel(TopK problem) {
  __shared__ uint64_t keys[kSorted];
  __shared__ int kept;
  const int64_t m = blockIdx.x, first = problem.offsets[m], P = problem.offsets[m + 1] - first;
  if (threadIdx.x == 0) {
    ILVR_DEVICE_CHECK(P >= 0 && first >= 0 && first + P <= problem.N, "candidate_offsets");
    kept = 0;
  }
  const float* score = (problem.score ? problem.score : problem.cosine) + first;
  const bool* pool = problem.pool ? problem.pool + first : nullptr;

  // the largest keys to the front: new ones come in behind the best so far
  int size = 2;
  while (size < kSorted && size < P) size *= 2;
  const int fresh = P <= kSorted ? size : kMost;
  for (int i = threadIdx.x; i < kSorted; i += kSelectBlock) keys[i] = 0;
  for (int64_t begin = 0; begin < P; begin += fresh) {
    __syncthreads();
    for (int i = threadIdx.x; i < fresh; i += kSelectBlock)
      keys[size - fresh + i] =
          begin + i < P && (!pool || pool[begin + i]) ? sort_key(score[begin + i], begin + i) : 0;
    sort_block(keys, size);
  }
  __syncthreads();
  const float scale = problem.inverse_temperature, highest = keys[0] ? score_of(keys[0]) * scale : 0;

  float mass = 0, moment = 0;  // entropy = log(mass) - sum of p * shifted
  for (int64_t i = threadIdx.x; i < P; i += kSelectBlock) {
    if (pool && !pool[i]) continue;
    const float shifted = score[i] * scale - highest, e = expf(shifted);
    mass += e;
    moment = fmaf(e, shifted, moment);
  }
  mass = block_sum<kSelectBlock>(mass);
  moment = block_sum<kSelectBlock>(moment);

  const int64_t K = problem.K;
  const int most = static_cast<int>(K < P ? K : P);
  if (threadIdx.x < 32) {  // masses add up in order, so that kept is where they first reach top_p
    float before = 0;
    for (int i = 0; i < most && before < problem.top_p; i += 32) {
      const int place = i + threadIdx.x;
      const bool exists = place < most && keys[place];
      const float p = exists ? expf(score_of(keys[place]) * scale - highest) / mass : 0;
      float sum = p;
      for (int step = 1; step < 32; step *= 2) {
        const float left = __shfl_up_sync(kFullWarp, sum, step);
        if (threadIdx.x >= step) sum += left;
      }
      const float mine = __shfl_up_sync(kFullWarp, sum, 1);
      const bool keep = exists && before + (threadIdx.x ? mine : 0.0f) < problem.top_p;
      const unsigned votes = __ballot_sync(kFullWarp, keep);
      if (threadIdx.x == 0) kept += __popc(votes);
      before += __shfl_sync(kFullWarp, sum, 31);
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < K; i += kSelectBlock)
    problem.indices[m * K + i] = i < kept ? first + static_cast<uint32_t>(~keys[i]) : -1;
  if (threadIdx.x == 0) {
    problem.kept[m] = kept;
    problem.entropy[m] = keys[0] ? logf(mass) - moment / mass : 0;
  }
}

template <class T>
void launch_cosines(const TopK& problem, cudaStream_t stream) {
  const int64_t blocks = (problem.N + kWarps - 1) / kWarps;
  cosine_kernel<T><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(problem);
}

}  // namespace

cudaError_t selective_topk(const TopK& problem, cudaStream_t stream) {
  if (problem.M == 0) return cudaSuccess;
  if (problem.N > 0 && !problem.score) switch (problem.type) {
      case Type::kFloat: launch_cosines<float>(problem, stream); break;
      case Type::kHalf: launch_cosines<__half>(problem, stream); break;
      case Type::kBFloat16: launch_cosines<__nv_bfloat16>(problem, stream); break;
    }
  select_kernel<<<static_cast<unsigned>(problem.M), kSelectBlock, 0, stream>>>(problem);
  return cudaGetLastError();
}

}  // namespace ilvr
