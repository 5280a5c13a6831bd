// Cosines of all candidates in one pass over memory, then softmax, ranking and prefix segment by segment.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace ilvr {
namespace {

using at::Tensor;

template <class T>
std::vector<Sum<T>> cosines(const Tensor& query, const Tensor& candidates, const int64_t* offsets, const bool* pool) {
  using Float = Sum<T>;
  const int64_t M = query.size(0), N = candidates.size(0), D = candidates.size(1);
  const Float* q = query.const_data_ptr<Float>();
  const T* rows = candidates.const_data_ptr<T>();
  std::vector<Float> inverse(M), cosine(N);
  for (int64_t m = 0; m < M; ++m) inverse[m] = inverse_length(products(q + m * D, q + m * D, D).squares);
  at::parallel_for(0, N, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, D)), [&](int64_t begin, int64_t end) {
    int64_t m = std::upper_bound(offsets, offsets + M + 1, begin) - offsets - 1;
    for (int64_t n = begin; n < end; ++n) {
      while (n >= offsets[m + 1]) ++m;
      if (pool && !pool[n]) continue;
      const auto [dot, squares] = products(rows + n * D, q + m * D, D);
      cosine[n] = dot * inverse_length(squares) * inverse[m];
    }
  });
  return cosine;
}

// One segment: the scores of its P candidates -> K rows (first + place, -1 where not kept), their number, the entropy.
// Only candidates in the pool count; without one all do.
template <class Float>
void select(const Float* score, const bool* pool, int64_t P, int64_t first, int64_t K, double top_p, Float temperature,
            int64_t* index, int32_t& kept, Float& entropy) {
  kept = 0, entropy = 0;
  std::fill_n(index, K, -1);
  std::vector<int64_t> order;
  order.reserve(P);
  for (int64_t i = 0; i < P; ++i)
    if (!pool || pool[i]) order.push_back(i);
  if (order.empty()) return;
  Float highest = score[order[0]];
  for (const int64_t i : order) highest = std::max(highest, score[i]);
  highest /= temperature;
  Float mass = 0, log_mass = 0;
  for (const int64_t i : order) mass += std::exp(score[i] / temperature - highest);
  log_mass = std::log(mass);
  for (const int64_t i : order) {
    const Float log_p = score[i] / temperature - highest - log_mass;
    const Float p = std::exp(log_p);
    if (p > 0) entropy -= p * log_p;
  }
  const int64_t most = std::min<int64_t>(K, order.size());
  std::partial_sort(order.begin(), order.begin() + most, order.end(), [&](int64_t a, int64_t b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
  });
  Float before = 0;
  while (kept < most && before < static_cast<Float>(top_p)) {
    before += std::exp(score[order[kept]] / temperature - highest - log_mass);
    index[kept] = first + order[kept];
    ++kept;
  }
}

std::tuple<Tensor, Tensor, Tensor> selective_topk(const Tensor& query_, const Tensor& candidates_,
                                                  const Tensor& offsets_, int64_t K, double top_p,
                                                  double temperature, const std::optional<Tensor>& pool_,
                                                  const std::optional<Tensor>& score_) {
  const int64_t M = query_.size(0), N = candidates_.size(0);
  const auto type = candidates_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor query = query_.to(type).contiguous(), candidates = candidates_.contiguous();
  const Tensor offset_tensor = offsets_.contiguous();
  const Tensor pool_tensor = pool_ ? pool_->contiguous() : Tensor();
  const Tensor score_tensor = score_ ? score_->to(type).contiguous() : Tensor();
  const bool* pool = pool_ ? pool_tensor.const_data_ptr<bool>() : nullptr;
  const int64_t* offsets = offset_tensor.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[M] == N && std::is_sorted(offsets, offsets + M + 1),
                    "candidate_offsets: expected ascending numbers from 0 to ", N);
  Tensor index = at::empty({M, K}, offsets_.options());
  Tensor kept = at::empty({M}, offsets_.options().dtype(at::kInt));
  Tensor entropy = at::empty({M}, candidates.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, candidates.scalar_type(), "selective_topk", [&] {
    using Float = Sum<scalar_t>;
    const auto cosine = score_ ? std::vector<Float>() : cosines<scalar_t>(query, candidates, offsets, pool);
    const Float* score = score_ ? score_tensor.const_data_ptr<Float>() : cosine.data();
    at::parallel_for(0, M, std::max<int64_t>(1, M * 1024 / std::max<int64_t>(1, N)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        select<Float>(score + offsets[m], pool ? pool + offsets[m] : nullptr, offsets[m + 1] - offsets[m], offsets[m],
                      K, top_p, temperature, index.mutable_data_ptr<int64_t>() + m * K,
                      kept.mutable_data_ptr<int32_t>()[m], entropy.mutable_data_ptr<Float>()[m]);
    });
  });
  return {index, kept, entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvr_ds, CPU, m) { m.impl("selective_topk", selective_topk); }

}  // namespace ilvr
