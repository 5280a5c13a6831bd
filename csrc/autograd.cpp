// The loss's gradient, registered in C++: torch.library.register_autograd would add 40 us of Python to each step.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace ilvr {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs call_forward(const Tensor& prediction, const Tensor& candidates, const Tensor& target_index,
                     const Tensor& segment_of_slot, const Tensor& offsets, const Tensor& selected, double temperature,
                     const OptionalTensor& samples, const OptionalTensor& noise) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ilvr_ds::selective_contrastive", "")
                             .typed<decltype(call_forward)>();
  return op.call(prediction, candidates, target_index, segment_of_slot, offsets, selected, temperature, samples, noise);
}

Tensor call_backward(const Tensor& grad_alignment, const Tensor& grad_contrastive, const Tensor& prediction,
                     const Tensor& candidates, const Tensor& target_index, const Tensor& segment_of_slot,
                     const Tensor& offsets, double temperature, const OptionalTensor& samples,
                     const OptionalTensor& noise, const Tensor& slots, const Tensor& rows) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ilvr_ds::selective_contrastive_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_alignment, grad_contrastive, prediction, candidates, target_index, segment_of_slot, offsets,
                 temperature, samples, noise, slots, rows);
}

OptionalTensor given(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct Loss : torch::autograd::Function<Loss> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& prediction,
                                                const Tensor& candidates, const Tensor& target_index,
                                                const Tensor& segment_of_slot, const Tensor& offsets,
                                                const Tensor& selected, double temperature,
                                                const OptionalTensor& samples, const OptionalTensor& noise) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [alignment, contrastive, slots, rows] = call_forward(
        prediction, candidates, target_index, segment_of_slot, offsets, selected, temperature, samples, noise);
    context->save_for_backward({prediction, candidates, target_index, segment_of_slot, offsets,
                                samples.value_or(Tensor()), noise.value_or(Tensor()), slots, rows});
    context->saved_data["temperature"] = temperature;
    context->mark_non_differentiable({slots, rows});
    context->set_materialize_grads(false);  // zeros for [N] rows would cost a launch
    return {alignment, contrastive, slots, rows};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor& slots = saved[7];
    const auto gradient = [&](int i) {
      return grads[i].defined() ? grads[i] : at::zeros_symint({slots.sym_size(0)}, slots.options());
    };
    torch::autograd::variable_list result(9);  // of the prediction, and nothing for the other arguments
    result[0] = call_backward(gradient(0), gradient(1), saved[0], saved[1], saved[2], saved[3], saved[4],
                              context->saved_data["temperature"].toDouble(), given(saved[5]), given(saved[6]), slots,
                              saved[8]);
    return result;
  }
};

Outputs differentiable(const Tensor& prediction, const Tensor& candidates, const Tensor& target_index,
                       const Tensor& segment_of_slot, const Tensor& offsets, const Tensor& selected,
                       double temperature, const OptionalTensor& samples, const OptionalTensor& noise) {
  auto outputs = Loss::apply(prediction, candidates, target_index, segment_of_slot, offsets, selected, temperature,
                             samples, noise);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvr_ds, Autograd, m) { m.impl("selective_contrastive", differentiable); }

}  // namespace ilvr
