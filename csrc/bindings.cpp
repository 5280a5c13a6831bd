// The operators' schemas. Kernels register themselves in cuda/, the gradient in autograd.cpp, fake kernels in
// ilvr_ds/ops/.
#include <torch/library.h>

TORCH_LIBRARY(ilvr_ds, m) {
  // pool [N]: only these candidates may be picked. score [N] takes the place of their cosines.
  m.def(
      "selective_topk(Tensor query, Tensor candidates, Tensor candidate_offsets, int k, float top_p, "
      "float temperature, Tensor? pool=None, Tensor? score=None) -> (Tensor indices, Tensor kept, Tensor entropy)");
  // sample_of_segment: given for negatives "all", absent for "segment". slots [S, 4] and rows [N] are kept for the
  // backward: 1/|prediction|, 1/|target|, their cosine and the contrastive loss of a slot (inf where it has none); the
  // segment of a candidate, as its complement ~segment where the candidate is selected.
  m.def(
      "selective_contrastive(Tensor prediction, Tensor candidates, Tensor target_index, Tensor segment_of_slot, "
      "Tensor candidate_offsets, Tensor selected, float temperature, Tensor? sample_of_segment, Tensor? noise) "
      "-> (Tensor alignment, Tensor contrastive, Tensor slots, Tensor rows)");
  m.def(
      "selective_contrastive_backward(Tensor grad_alignment, Tensor grad_contrastive, Tensor prediction, "
      "Tensor candidates, Tensor target_index, Tensor segment_of_slot, Tensor candidate_offsets, float temperature, "
      "Tensor? sample_of_segment, Tensor? noise, Tensor slots, Tensor rows) -> Tensor");
  m.def(
      "ema_update(Tensor(a!) upper, Tensor(b!) lower, Tensor student, float weight, Tensor(c!) sums) -> ()");
}
