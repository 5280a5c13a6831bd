// Tiles of candidates: widen, one matrix product with the slots that need them, online log-sum-exp. The backward forms
// the tiles again. No buffer is larger than [slots, kTile] or [kTile, D] a thread.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "rows.h"

namespace ilvr {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 128;

enum { kInversePrediction, kInverseTarget, kPositive, kLoss, kSlotNumbers };  // kLoss: inf where there is none

struct Slot {
  int32_t segment, group;
};

// Which candidates are negatives of which slots: those of the slot's own segment that are not selected (rows holds ~m
// for these), and with samples given those of another group, a group being the segments of one sample.
class Negatives {
 public:
  Negatives(const Tensor& offsets, const Tensor& segment_of_slot, const OptionalTensor& sample_of_segment,
            const Tensor& rows)
      : every_(sample_of_segment.has_value()), rows_(rows.const_data_ptr<int32_t>()) {
    const int64_t M = offsets.numel() - 1;
    offsets_ = offsets.const_data_ptr<int64_t>();
    group_.assign(M, 0);
    if (every_) {
      std::unordered_map<int64_t, int32_t> first;
      const Tensor samples = sample_of_segment->contiguous();
      for (int64_t m = 0; m < M; ++m)
        group_[m] = first.emplace(samples.const_data_ptr<int64_t>()[m], static_cast<int32_t>(m)).first->second;
    }
    const int64_t* segment = segment_of_slot.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < segment_of_slot.numel(); ++s) {
      TORCH_CHECK_INDEX(segment[s] >= 0 && segment[s] < M, "segment_of_slot: ", segment[s], " is not one of ", M,
                        " segments");
      slots_.push_back({static_cast<int32_t>(segment[s]), group_[segment[s]]});
    }
  }

  const Slot& slot(int64_t s) const { return slots_[s]; }

  // The candidates begin to end as seen by a slot.
  void describe(int64_t begin, int64_t end, Slot* out) const {
    for (int64_t n = begin; n < end; ++n) {
      const int32_t row = rows_[n];
      out[n - begin] = {row, group_[row < 0 ? ~row : row]};
    }
  }

  // The smallest range of slots that holds all with a negative in begin to end.
  std::pair<int64_t, int64_t> slots_for(int64_t begin, int64_t end) const {
    int64_t first = 0, last = slots_.size();
    if (every_) return {first, last};
    const auto meets = [&](const Slot& slot) {
      return offsets_[slot.segment] < end && offsets_[slot.segment + 1] > begin;
    };
    while (first < last && !meets(slots_[first])) ++first;
    while (first < last && !meets(slots_[last - 1])) --last;
    return {first, last};
  }

 private:
  bool every_;
  const int32_t* rows_;
  const int64_t* offsets_;
  std::vector<int32_t> group_;
  std::vector<Slot> slots_;
};

// What a thread needs to form tiles of logits, cosine over temperature: [slots, kTile].
template <class T>
class Tiles {
 public:
  using Float = Sum<T>;

  Tiles(const Tensor& unit, const Tensor& candidates, const Negatives& negatives, Float temperature)
      : unit_(unit), candidates_(candidates), negatives_(negatives), temperature_(temperature) {
    if constexpr (!std::is_same_v<T, Float>) wide_ = at::empty({kTile, candidates.size(1)}, unit.options());
    products_ = at::empty({unit.size(0), kTile}, unit.options());
  }

  // Returns false where no slot needs a candidate of this tile.
  bool load(int64_t tile) {
    begin = tile * kTile;
    size = std::min(kTile, candidates_.size(0) - begin);
    std::tie(first, last) = negatives_.slots_for(begin, begin + size);
    if (first == last) return false;
    const int64_t D = candidates_.size(1);
    const T* source = candidates_.template const_data_ptr<T>() + begin * D;
    for (int64_t b = 0; b < size; ++b) {
      inverse[b] = inverse_length(products(source + b * D, source + b * D, D).squares);
      scale[b] = inverse[b] / temperature_;
    }
    if constexpr (std::is_same_v<T, Float>) {
      features = candidates_.narrow(0, begin, size);
    } else {
      for (int64_t b = 0; b < size; ++b) widen(source + b * D, wide_.template mutable_data_ptr<Float>() + b * D, D);
      features = wide_.narrow(0, 0, size);
    }
    dots = products_.narrow(0, 0, last - first).narrow(1, 0, size);
    at::cpu::mm_out(dots, unit_.narrow(0, first, last - first), features.t());
    negatives_.describe(begin, begin + size, seen);
    return true;
  }

  Float* row(int64_t s) { return products_.template mutable_data_ptr<Float>() + (s - first) * kTile; }

  int64_t begin, size, first, last;
  Float inverse[kTile], scale[kTile];
  Slot seen[kTile];
  Tensor features, dots;

 private:
  const Tensor &unit_, &candidates_;
  const Negatives& negatives_;
  const Float temperature_;
  Tensor wide_, products_;
};

// Log-sum-exp that has seen some logits: log(sum) + top.
template <class Float>
struct Online {
  Float top = -std::numeric_limits<Float>::infinity(), sum = 0;

  void merge(const Online& other) {
    if (other.sum == 0) return;
    const Float highest = std::max(top, other.top);
    sum = sum * std::exp(top - highest) + other.sum * std::exp(other.top - highest);
    top = highest;
  }
};

template <class Float>
ILVR_CLONES Online<Float> log_sum_exp(Float* dots, const Float* scale, const Slot* seen, Slot slot, int64_t size) {
  constexpr Float kNone = -std::numeric_limits<Float>::infinity();
  Float top = kNone, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t b = 0; b < size; ++b) {
    const bool negative = (seen[b].segment == slot.segment) | (seen[b].group != slot.group);
    dots[b] = negative ? dots[b] * scale[b] : kNone;
    top = std::max(top, dots[b]);
  }
  if (top == kNone) return {};
#pragma omp simd reduction(+ : sum)
  for (int64_t b = 0; b < size; ++b) sum += exp_negative(dots[b] - top);
  return {top, sum};
}

// Dots to softmax(logit) / |candidate|, by which a candidate counts in the gradient of the unit prediction.
template <class Float>
ILVR_CLONES void weights(Float* dots, const Float* scale, const Float* inverse, const Slot* seen, Slot slot,
                         Float log_sum, int64_t size) {
#pragma omp simd
  for (int64_t b = 0; b < size; ++b) {
    const bool negative = (seen[b].segment == slot.segment) | (seen[b].group != slot.group);
    const Float log_p = std::min(dots[b] * scale[b] - log_sum, Float(0));
    dots[b] = negative ? exp_negative(log_p) * inverse[b] : 0;
  }
}

Tensor label_rows(const Tensor& offset_tensor, const Tensor& selected_, int64_t N) {
  const int64_t M = offset_tensor.numel() - 1;
  const int64_t* offsets = offset_tensor.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[M] == N && std::is_sorted(offsets, offsets + M + 1),
                    "candidate_offsets: expected ascending numbers from 0 to ", N);
  Tensor rows = at::empty({N}, offset_tensor.options().dtype(at::kInt));
  int32_t* row = rows.mutable_data_ptr<int32_t>();
  for (int64_t m = 0; m < M; ++m) std::fill(row + offsets[m], row + offsets[m + 1], static_cast<int32_t>(m));
  const Tensor selected = selected_.contiguous();
  const int64_t* chosen = selected.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < selected.numel(); ++i) {
    TORCH_CHECK_INDEX(chosen[i] < N, "selected: row ", chosen[i], " of ", N, " candidates");
    if (chosen[i] >= 0 && row[chosen[i]] >= 0) row[chosen[i]] = ~row[chosen[i]];
  }
  return rows;
}

// The target of a slot, with its noise, in the type of sums.
template <class T>
void read_target(const Tensor& candidates, const OptionalTensor& noise, int64_t index, int64_t s, Sum<T>* out) {
  const int64_t D = candidates.size(1);
  widen(candidates.const_data_ptr<T>() + index * D, out, D);
  if (!noise) return;
  const Sum<T>* added = noise->const_data_ptr<Sum<T>>() + s * D;
  for (int64_t d = 0; d < D; ++d) out[d] += added[d];
}

int64_t tiles_of(int64_t N) { return (N + kTile - 1) / kTile; }
int64_t tile_grain(int64_t D) { return std::max<int64_t>(1, 65536 / (kTile * std::max<int64_t>(1, D))); }
int64_t slot_grain(int64_t D) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, D)); }

OptionalTensor as_type(const OptionalTensor& noise, at::ScalarType type) {
  return noise ? OptionalTensor(noise->to(type).contiguous()) : std::nullopt;
}

// Predictions scaled to length 1: [S, D] in the type of sums.
template <class T>
Tensor unit_rows(const Tensor& prediction, const Tensor& slots) {
  using Float = Sum<T>;
  const int64_t S = prediction.size(0), D = prediction.size(1);
  Tensor unit = at::empty({S, D}, slots.options());
  at::parallel_for(0, S, slot_grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Float* out = unit.mutable_data_ptr<Float>() + s * D;
      widen(prediction.const_data_ptr<T>() + s * D, out, D);
      const Float inverse = slots.const_data_ptr<Float>()[s * kSlotNumbers + kInversePrediction];
      for (int64_t d = 0; d < D; ++d) out[d] *= inverse;
    }
  });
  return unit;
}

// Fills all of slots but the loss.
template <class T>
void measure_slots(const Tensor& prediction, const Tensor& candidates, const Tensor& target_index,
                   const OptionalTensor& noise, Tensor& slots) {
  using Float = Sum<T>;
  const int64_t S = prediction.size(0), D = prediction.size(1), N = candidates.size(0);
  const int64_t* target = target_index.const_data_ptr<int64_t>();
  at::parallel_for(0, S, slot_grain(D), [&](int64_t begin, int64_t end) {
    std::vector<Float> wide(D), aim(D);
    for (int64_t s = begin; s < end; ++s) {
      TORCH_CHECK_INDEX(target[s] < N, "target_index: row ", target[s], " of ", N, " candidates");
      Float* slot = slots.mutable_data_ptr<Float>() + s * kSlotNumbers;
      widen(prediction.const_data_ptr<T>() + s * D, wide.data(), D);
      if (target[s] >= 0) read_target<T>(candidates, noise, target[s], s, aim.data());
      else std::fill(aim.begin(), aim.end(), Float(0));
      const auto [dot, squares] = products(wide.data(), aim.data(), D);
      slot[kInversePrediction] = inverse_length(squares);
      slot[kInverseTarget] = inverse_length(products(aim.data(), aim.data(), D).squares);
      slot[kPositive] = dot * slot[kInversePrediction] * slot[kInverseTarget];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& prediction_, const Tensor& candidates_, const Tensor& target_index_, const Tensor& segment_of_slot_,
    const Tensor& offsets_, const Tensor& selected, double temperature, const OptionalTensor& sample_of_segment,
    const OptionalTensor& noise_) {
  const int64_t S = prediction_.size(0), D = prediction_.size(1), N = candidates_.size(0);
  const auto type = candidates_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor prediction = prediction_.contiguous(), candidates = candidates_.contiguous();
  const Tensor target_index = target_index_.contiguous(), offsets = offsets_.contiguous();
  const OptionalTensor noise = as_type(noise_, type);
  const Tensor rows = label_rows(offsets, selected, N);
  const Negatives negatives(offsets, segment_of_slot_.contiguous(), sample_of_segment, rows);
  const auto options = prediction.options().dtype(type);
  Tensor alignment = at::empty({S}, options), contrastive = at::empty({S}, options);
  Tensor slots = at::empty({S, kSlotNumbers}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, candidates.scalar_type(), "selective_contrastive", [&] {
    using Float = Sum<scalar_t>;
    measure_slots<scalar_t>(prediction, candidates, target_index, noise, slots);
    const Tensor unit = unit_rows<scalar_t>(prediction, slots);
    std::vector<Online<Float>> seen(at::get_num_threads() * S);
    at::parallel_for(0, S ? tiles_of(N) : 0, tile_grain(D), [&](int64_t begin, int64_t end) {
      const c10::impl::ExcludeDispatchKeyGuard plain(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
      Tiles<scalar_t> tiles(unit, candidates, negatives, temperature);
      Online<Float>* mine = seen.data() + at::get_thread_num() * S;
      for (int64_t tile = begin; tile < end; ++tile) {
        if (!tiles.load(tile)) continue;
        for (int64_t s = tiles.first; s < tiles.last; ++s)
          mine[s].merge(log_sum_exp(tiles.row(s), tiles.scale, tiles.seen, negatives.slot(s), tiles.size));
      }
    });
    for (int64_t s = 0; s < S; ++s) {
      Float* slot = slots.mutable_data_ptr<Float>() + s * kSlotNumbers;
      Online<Float> all;
      for (int64_t t = 0; t < at::get_num_threads(); ++t) all.merge(seen[t * S + s]);
      const bool has_target = target_index.const_data_ptr<int64_t>()[s] >= 0, has_loss = has_target && all.sum > 0;
      const Float positive = slot[kPositive] / static_cast<Float>(temperature);
      all.merge({positive, 1});
      const Float loss = all.top - positive + std::log(all.sum);  // exact where the target dominates
      slot[kLoss] = has_loss ? loss : std::numeric_limits<Float>::infinity();
      alignment.mutable_data_ptr<Float>()[s] = has_target ? 1 - slot[kPositive] : 0;
      contrastive.mutable_data_ptr<Float>()[s] = has_loss ? loss : 0;
    }
  });
  return {alignment, contrastive, slots, rows};
}

Tensor backward(const Tensor& grad_alignment_, const Tensor& grad_contrastive_, const Tensor& prediction_,
                const Tensor& candidates_, const Tensor& target_index_, const Tensor& segment_of_slot_,
                const Tensor& offsets_, double temperature, const OptionalTensor& sample_of_segment,
                const OptionalTensor& noise_, const Tensor& slots_, const Tensor& rows_) {
  const int64_t S = prediction_.size(0), D = prediction_.size(1), N = candidates_.size(0);
  const Tensor prediction = prediction_.contiguous(), candidates = candidates_.contiguous();
  const Tensor target_index = target_index_.contiguous(), offsets = offsets_.contiguous();
  const Tensor slots = slots_.contiguous(), rows = rows_.contiguous();
  const Tensor grad_alignment = grad_alignment_.contiguous(), grad_contrastive = grad_contrastive_.contiguous();
  const OptionalTensor noise = as_type(noise_, slots.scalar_type());
  const Negatives negatives(offsets, segment_of_slot_.contiguous(), sample_of_segment, rows);
  Tensor grad = at::empty({S, D}, prediction.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, candidates.scalar_type(), "selective_contrastive", [&] {
    using Float = Sum<scalar_t>;
    const Float* slot = slots.const_data_ptr<Float>();
    const Tensor unit = unit_rows<scalar_t>(prediction, slots);
    std::vector<Tensor> pulls(at::get_num_threads());  // of each thread: sum of weight * candidate, [S, D]
    at::parallel_for(0, S ? tiles_of(N) : 0, tile_grain(D), [&](int64_t begin, int64_t end) {
      const c10::impl::ExcludeDispatchKeyGuard plain(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
      Tiles<scalar_t> tiles(unit, candidates, negatives, temperature);
      Tensor& mine = pulls[at::get_thread_num()] = at::zeros({S, D}, slots.options());
      for (int64_t tile = begin; tile < end; ++tile) {
        if (!tiles.load(tile)) continue;
        for (int64_t s = tiles.first; s < tiles.last; ++s) {
          const Float* numbers = slot + s * kSlotNumbers;
          const Float log_sum = numbers[kPositive] / static_cast<Float>(temperature) + numbers[kLoss];
          weights(tiles.row(s), tiles.scale, tiles.inverse, tiles.seen, negatives.slot(s), log_sum, tiles.size);
        }
        Tensor part = mine.narrow(0, tiles.first, tiles.last - tiles.first);
        at::cpu::addmm_(part, tiles.dots, tiles.features, 1, 1);
      }
    });
    at::parallel_for(0, S, slot_grain(D), [&](int64_t begin, int64_t end) {
      std::vector<Float> total(D), aim(D);
      for (int64_t s = begin; s < end; ++s) {
        const auto numbers = slot + s * kSlotNumbers;
        const int64_t target = target_index.const_data_ptr<int64_t>()[s];
        const bool has_loss = !std::isinf(numbers[kLoss]);
        const Float push = has_loss ? grad_contrastive.const_data_ptr<Float>()[s] / static_cast<Float>(temperature) : 0;
        const Float along = push * std::expm1(-numbers[kLoss]) - grad_alignment.const_data_ptr<Float>()[s];
        std::fill(total.begin(), total.end(), Float(0));
        if (target >= 0) {
          read_target<scalar_t>(candidates, noise, target, s, aim.data());
          for (int64_t d = 0; d < D; ++d) total[d] = along * numbers[kInverseTarget] * aim[d];
        }
        for (const Tensor& pull : pulls)
          if (pull.defined())
            for (int64_t d = 0; d < D; ++d) total[d] += push * pull.const_data_ptr<Float>()[s * D + d];
        const Float* z = unit.const_data_ptr<Float>() + s * D;
        const Float radial = products(z, total.data(), D).dot;
        scalar_t* out = grad.mutable_data_ptr<scalar_t>() + s * D;
        for (int64_t d = 0; d < D; ++d)
          out[d] = static_cast<scalar_t>((total[d] - radial * z[d]) * numbers[kInversePrediction]);
      }
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvr_ds, CPU, m) {
  m.impl("selective_contrastive", forward);
  m.impl("selective_contrastive_backward", backward);
}

}  // namespace ilvr
