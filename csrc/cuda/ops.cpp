// From tensors to kernels: memory for outputs and scratch, the stream, errors of launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "selective.h"

namespace ilvr {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_TYPE(false, "expected float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

template <class T>
T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

Tensor scratch(at::IntArrayRef size, const Tensor& like, at::ScalarType type) {
  return at::empty(size, like.options().dtype(type));
}

int processors(const Tensor& tensor) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return count;
}

// Contiguous versions of the arguments, which the pointers in Contrastive point into.
struct Arguments {
  Tensor prediction, candidates, target_index, segment_of_slot, offsets;
  OptionalTensor samples, noise;

  Arguments(const Tensor& prediction, const Tensor& candidates, const Tensor& target_index,
            const Tensor& segment_of_slot, const Tensor& offsets, const OptionalTensor& samples,
            const OptionalTensor& noise)
      : prediction(prediction.contiguous()), candidates(candidates.contiguous()),
        target_index(target_index.contiguous()), segment_of_slot(segment_of_slot.contiguous()),
        offsets(offsets.contiguous()) {
    if (samples) this->samples = samples->contiguous();
    if (noise) this->noise = noise->to(at::kFloat).contiguous();
  }

  Contrastive problem(double temperature, const Tensor& slots, const Tensor& rows) const {
    return {type_of(candidates),
            prediction.size(0),
            candidates.size(0),
            candidates.size(1),
            offsets.numel() - 1,
            static_cast<float>(1 / temperature),
            prediction.const_data_ptr(),
            candidates.const_data_ptr(),
            target_index.const_data_ptr<int64_t>(),
            segment_of_slot.const_data_ptr<int64_t>(),
            offsets.const_data_ptr<int64_t>(),
            samples ? samples->const_data_ptr<int64_t>() : nullptr,
            noise ? noise->const_data_ptr<float>() : nullptr,
            data<float4>(slots),
            data<int32_t>(rows)};
  }
};

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& query_, const Tensor& candidates_, const Tensor& offsets_,
                                        int64_t K, double top_p, double temperature, const OptionalTensor& pool_,
                                        const OptionalTensor& score_) {
  const c10::cuda::CUDAGuard guard(candidates_.device());
  const int64_t M = query_.size(0), N = candidates_.size(0), D = candidates_.size(1);
  const Tensor query = query_.to(at::kFloat).contiguous(), candidates = candidates_.contiguous();
  const Tensor offsets = offsets_.contiguous();
  const Tensor pool = pool_ ? pool_->contiguous() : Tensor();
  const Tensor score = score_ ? score_->to(at::kFloat).contiguous() : Tensor();
  Tensor index = scratch({M, K}, offsets, at::kLong), kept = scratch({M}, offsets, at::kInt);
  Tensor entropy = scratch({M}, query, at::kFloat), cosine = scratch({N}, query, at::kFloat);
  const TopK problem{type_of(candidates), M, N, D, K, static_cast<float>(top_p), static_cast<float>(1 / temperature),
                     query.const_data_ptr<float>(), candidates.const_data_ptr(), offsets.const_data_ptr<int64_t>(),
                     pool_ ? pool.const_data_ptr<bool>() : nullptr, score_ ? score.const_data_ptr<float>() : nullptr,
                     data<float>(cosine), data<int64_t>(index), data<int32_t>(kept), data<float>(entropy)};
  C10_CUDA_CHECK(selective_topk(problem, c10::cuda::getCurrentCUDAStream()));
  return {index, kept, entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& prediction, const Tensor& candidates, const Tensor& target_index, const Tensor& segment_of_slot,
    const Tensor& offsets, const Tensor& selected_, double temperature, const OptionalTensor& samples,
    const OptionalTensor& noise) {
  const c10::cuda::CUDAGuard guard(candidates.device());
  const Arguments arguments(prediction, candidates, target_index, segment_of_slot, offsets, samples, noise);
  const int64_t S = prediction.size(0), N = candidates.size(0);
  Tensor alignment = scratch({S}, prediction, at::kFloat), contrastive = scratch({S}, prediction, at::kFloat);
  Tensor slots = scratch({S, 4}, prediction, at::kFloat), rows = scratch({N}, prediction, at::kInt);
  if (S == 0) return {alignment, contrastive, slots, rows.zero_()};
  const Contrastive problem = arguments.problem(temperature, slots, rows);
  const Plan cut = plan(problem, processors(candidates));
  const Tensor partial = scratch({cut.walkers, S, 2}, prediction, at::kFloat), selected = selected_.contiguous();
  const Forward out{selected.const_data_ptr<int64_t>(), selected.numel(), data<float2>(partial),
                    data<float>(alignment), data<float>(contrastive)};
  C10_CUDA_CHECK(contrastive_forward(problem, cut, out, c10::cuda::getCurrentCUDAStream()));
  return {alignment, contrastive, slots, rows};
}

Tensor backward(const Tensor& grad_alignment_, const Tensor& grad_contrastive_, const Tensor& prediction,
                const Tensor& candidates, const Tensor& target_index, const Tensor& segment_of_slot,
                const Tensor& offsets, double temperature, const OptionalTensor& samples, const OptionalTensor& noise,
                const Tensor& slots_, const Tensor& rows_) {
  const c10::cuda::CUDAGuard guard(candidates.device());
  const Arguments arguments(prediction, candidates, target_index, segment_of_slot, offsets, samples, noise);
  const Tensor slots = slots_.contiguous(), rows = rows_.contiguous();
  const int64_t S = prediction.size(0), D = prediction.size(1);
  Tensor grad = scratch({S, D}, prediction, prediction.scalar_type());
  if (S == 0 || candidates.numel() == 0) return grad.zero_();
  const Contrastive problem = arguments.problem(temperature, slots, rows);
  const Plan cut = plan(problem, processors(candidates));
  const Tensor grad_alignment = grad_alignment_.contiguous(), grad_contrastive = grad_contrastive_.contiguous();
  const Tensor weights = scratch({S, cut.chunk}, candidates, candidates.scalar_type());
  const Tensor inverse = scratch({cut.chunk}, slots, at::kFloat), pull = scratch({cut.splits, S, D}, slots, at::kFloat);
  const Backward out{grad_alignment.const_data_ptr<float>(), grad_contrastive.const_data_ptr<float>(),
                     weights.data_ptr(), data<float>(inverse), data<float>(pull), grad.data_ptr()};
  C10_CUDA_CHECK(contrastive_backward(problem, cut, out, c10::cuda::getCurrentCUDAStream()));
  return grad;
}

void follow(const Tensor& upper, const Tensor& lower, const Tensor& student, double weight, const Tensor& sums) {
  TORCH_CHECK(upper.scalar_type() == at::kBFloat16 && lower.scalar_type() == at::kShort &&
                  student.scalar_type() == at::kFloat && sums.scalar_type() == at::kDouble,
              "ema_update: expected bfloat16, int16, float32 and float64");
  TORCH_CHECK(upper.is_contiguous() && lower.is_contiguous() && student.is_contiguous() && sums.numel() == 2 &&
                  upper.numel() == student.numel() && lower.numel() == student.numel(),
              "ema_update: expected contiguous tensors of one size, and two sums");
  const c10::cuda::CUDAGuard guard(upper.device());
  const Momentum problem{data<uint16_t>(upper), data<int16_t>(lower), student.const_data_ptr<float>(),
                         student.numel(), static_cast<float>(weight), data<double>(sums)};
  C10_CUDA_CHECK(ema_update(problem, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvr_ds, CUDA, m) {
  m.impl("ema_update", follow);
  m.impl("selective_topk", topk);
  m.impl("selective_contrastive", forward);
  m.impl("selective_contrastive_backward", backward);
}

}  // namespace ilvr
