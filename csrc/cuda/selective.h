// What ops.cpp (which knows PyTorch) and the kernels (which do not, and so compile in seconds) tell each other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ilvr {

enum class Type { kFloat, kHalf, kBFloat16 };

struct TopK {
  Type type;
  int64_t M, N, D, K;
  float top_p, inverse_temperature;
  const float* query;       // [M, D]
  const void* candidates;   // [N, D]
  const int64_t* offsets;   // [M + 1]
  const bool* pool;         // [N], or null: all candidates may be picked
  const float* score;       // [N], or null: their cosines count, which are written to
  float* cosine;            // [N] scratch
  int64_t* indices;         // [M, K]
  int32_t* kept;            // [M]
  float* entropy;           // [M]
};

cudaError_t selective_topk(const TopK& problem, cudaStream_t stream);

struct Contrastive {
  Type type;
  int64_t S, N, D, M;
  float inverse_temperature;
  const void* prediction;          // [S, D]
  const void* candidates;          // [N, D]
  const int64_t* target_index;     // [S]
  const int64_t* segment_of_slot;  // [S]
  const int64_t* offsets;          // [M + 1]
  const int64_t* samples;          // [M], or null: negatives of the own segment only
  const float* noise;              // [S, D] or null
  float4* slots;                   // [S]: 1/|prediction|, 1/|target|, their cosine, loss (inf: none)
  int32_t* rows;                   // [N]: segment of the candidate, its complement where selected
};

// How the work is cut for a GPU.
struct Plan {
  int64_t slot_tiles;  // tiles of slots
  int64_t walkers;     // blocks that walk the candidates for one tile of slots
  int64_t chunk;       // candidates whose weights are in memory at one time in the backward
  int64_t splits;      // parts of a chunk that are summed apart
};

Plan plan(const Contrastive& problem, int processors);

struct Forward {
  const int64_t* selected;  // [num_selected]
  int64_t num_selected;
  float2* partial;  // [walkers, S] scratch: top, sum
  float *alignment, *contrastive;  // [S]
};

cudaError_t contrastive_forward(const Contrastive& problem, const Plan& plan, const Forward& out, cudaStream_t stream);

struct Backward {
  const float *grad_alignment, *grad_contrastive;  // [S]
  void* weights;   // [S, chunk] scratch, type of candidates
  float* inverse;  // [chunk] scratch: 1/|candidate|
  float* pull;     // [splits, S, D] scratch
  void* grad;      // [S, D] type of prediction
};

cudaError_t contrastive_backward(const Contrastive& problem, const Plan& plan, const Backward& out,
                                 cudaStream_t stream);

struct Momentum {
  uint16_t* upper;       // [n] in and out: the average rounded to bfloat16
  int16_t* lower;        // [n] in and out: its bits less those of upper
  const float* student;  // [n]
  int64_t n;
  float weight;  // average += weight * (student - average)
  double* sums;  // [2], added to: (average - student)^2 and student^2
};

cudaError_t ema_update(const Momentum& problem, cudaStream_t stream);

}  // namespace ilvr
