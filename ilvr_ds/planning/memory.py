"""Memory of one rank, term by term: the peak of torch's allocations on the GPU, and host memory.

Letters: P weights, W ranks, b bytes of an element of the computation (2 in bf16), D hidden size, I intermediate size,
Q and KV width of all query and of all key heads, V rows of the head, T tokens of a micro-batch.

Persistent states (ZeRO-3; ZeRO-2 holds the weights whole, ZeRO-1 the gradients too):
    weights b P / W, gradients b P_trained / W (4 instead of b where train.gradient_precision is fp32), float32
    master weights 4 P_trained / W, and Adam's two moments: 8 P_trained / W, or 2 and a scale for each 256 elements in
    8 bit. Optimizer offload moves gradients, master weights and moments to the host.

Bytes per token that a decoder layer keeps until the backward, in 16 bit, with flash attention:
    none        8 D + 4 Q + 4 KV + 6 I      two norms (input, output), queries, keys, values, the output of attention,
                                            both projections of the gated layer and their product
                16 D + 4 Q + 4 KV + 8 I     stock layers: norms keep the input in float32, the normalised input and the
                                            output, and the gated layer its activation too
    selective    6 D + 4 Q + 4 KV + 4 I     the layer's input and the outputs of attention and of matrix products
    full         2 D                        the layer's input
plus what is recomputed, one layer at a time.

Logits of one chunk of supervised tokens, in b, in float32 and as log-softmax: (b + 8) V per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from ilvr_ds.planning.setup import Setup

GIB = 2**30
HOST_PROCESS = 4 * GIB
"""Measured: a rank's process with torch, CUDA and DeepSpeed loaded, 3.6 to 4.4 GiB of its peak."""
HOST_WORKER = GIB // 2
"""Assumed: a loader process with its prefetched windows."""
CONTEXT = 3 * GIB // 2
"""Assumed: GPU memory of CUDA and NCCL beside torch's allocations."""
FRAGMENTS = 0.05
"""Assumed: fragmentation, what torch's allocator holds beyond what is allocated, as a fraction of that."""
UPDATE_ELEMENTS = 6 * 2**24
"""The momentum update, beside other work: six pieces of 2^24 elements."""
EXCHANGED_ELEMENTS = 2**26
"""Elements that ZeRO-1 and 2 exchange for the update at a time, or one larger weight."""
FOUR_BITS = 0.5 + (1 + 4 / 256) / 64
"""Bytes per 4-bit weight: half a byte, an 8-bit scale per 64 weights, a float32 scale per 256 of those."""
QUERY_ELEMENTS = 2**26
"""Of the teacher's prompt-to-image attention at a time, at most: distill/query.py"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    resident: dict[str, float]
    """On the GPU throughout"""
    moments: dict[str, float]
    """On the GPU in addition, one after the other"""
    host: dict[str, float]
    """In host memory"""
    checkpoint_copy: float
    """Extra host memory while a checkpoint is written in the background, if that much is free"""

    @property
    def peak(self) -> float:
        """Peak allocation on the GPU: torch's max_memory_allocated."""
        return sum(self.resident.values()) + max(self.moments.values())

    @property
    def needed(self) -> float:
        """Memory that the GPU must have."""
        return self.peak * (1 + FRAGMENTS) + CONTEXT


def predict_memory(setup: Setup) -> Memory:
    """All terms for a rank of `setup`."""
    return Memory(_resident(setup), _moments(setup), _host(setup), _checkpoint_copy(setup))


def optimizer_bytes(name: str) -> float:
    """Bytes of Adam's moments for each trained weight."""
    return 2 + 2 * 4 / 256 if name.endswith("8bit") else 8


def activation_bytes(setup: Setup) -> tuple[float, float]:
    """Per token and decoder layer: what is kept until the backward, and what recomputation adds."""
    text, wide = setup.geometry.text, setup.itemsize
    D, I = text.hidden_size, text.intermediate_size  # noqa: E741
    attention = 2 * wide * (text.heads + text.kv_heads) * text.head_dim
    norms, gated = (4 * wide * D, 3 * wide * I) if setup.has_fused_layers else (2 * (4 + 2 * wide) * D, 4 * wide * I)
    if text.has_head_norms:  # they keep what they normalise beside queries and keys
        norms += (wide if setup.has_fused_layers else 4 + wide) * (text.heads + text.kv_heads) * text.head_dim
    everything = norms + attention + gated
    kept = {"none": everything, "selective": wide * (3 * D + 2 * I) + attention, "full": wide * D}[setup.checkpointing]
    return kept, everything - kept


def _resident(setup: Setup) -> dict[str, float]:
    zero, wide, student = setup.zero, setup.itemsize, setup.held
    terms: dict[str, float] = {}
    if not zero.offloads_weights:
        terms["student's weights"] = wide * (setup.shard(student) if zero.stage == 3 else student)
    if setup.packed:
        terms["frozen layers in 4 bits"] = FOUR_BITS * setup.packed
    if not zero.offloads_optimizer:
        terms["gradients"] = setup.gradient_itemsize * (setup.shard(setup.trained) if zero.stage > 1 else setup.trained)
        terms["float32 weights"] = 4 * setup.shard(setup.trained)
        terms["moments of the optimizer"] = optimizer_bytes(setup.optimizer) * setup.shard(setup.trained)
    if _keeps_weights(setup):
        terms["weights kept whole"] = wide * student
    if setup.has_teacher and setup.teacher_offload == "none":
        terms["teacher's weights"] = wide * setup.shard(_teacher(setup))
        terms["teacher's averages"] = setup.average_itemsize * setup.shard(_averaged(setup))
    if setup.has_tower:
        terms["vision tower"] = wide * setup.geometry.vision.total
    terms["images of a window"] = _images(setup)
    if setup.records_latents:
        text = setup.geometry.text
        in_layers = setup.trained if setup.lora_rank else text.layers * text.layer + text.hidden_size
        columns = setup.micro_batch_size * 256 * -(-setup.sample.tokens // 256)  # enough for samples of equal length
        held = 2 * text.layers * text.kv_heads * text.head_dim * columns  # keys and values
        with_backward = setup.gradient_itemsize * in_layers + wide * held  # sums, and gradients of keys and values
        terms["recorded latents"] = wide * held + with_backward * setup.has_whole_chain
    buckets = 2 if zero.overlaps and setup.world > 1 else 1
    terms["buckets of gradients"] = setup.bucket_itemsize * zero.reduce_bucket * buckets
    return terms


def _images(setup: Setup) -> float:
    """Images of all micro-batches of a step: patches as loaded, 8 bits a value, and merged features."""
    vision, patches = setup.geometry.vision, setup.window_samples * setup.sample.patches
    pixels = patches * vision.patch_inputs / vision.temporal_patch_size if setup.has_tower else 0
    return pixels + setup.itemsize * patches / vision.merge_size**2 * vision.feature_width


def _update(setup: Setup) -> float:
    """The momentum update: averages in transfer, and the student's weights if they come from the host or other ranks:
    the largest exchange as it arrives, beside the one in use."""
    pieces = min(UPDATE_ELEMENTS, setup.shard(_averaged(setup)))
    if setup.zero.stage == 3 or setup.world == 1:
        return (8 if setup.zero.offloads_optimizer else 4) * pieces
    largest = 0 if setup.lora_rank else setup.geometry.text.embedding
    together = min(setup.trained, max(largest, EXCHANGED_ELEMENTS))
    # a single weight on the device is sent without a copy
    sent = together if setup.zero.offloads_optimizer else min(together, EXCHANGED_ELEMENTS)
    return 8 * pieces + 4 * (sent + setup.shard(together))


def _moments(setup: Setup) -> dict[str, float]:
    zero, wide, text = setup.zero, setup.itemsize, setup.geometry.text
    kept, again = activation_bytes(setup)
    tokens = setup.micro_tokens
    activations = setup.passes * tokens * (text.layers * kept + (3 * wide + 4 + 2 * wide) * text.hidden_size)
    labels = min(setup.logits_chunk, setup.micro_batch_size * setup.sample.labels)
    logits = (wide + 8) * text.vocab_size * labels
    largest_gradient = 0 if setup.lora_rank else wide * max(text.embedding, text.layer)
    of_head = wide * text.vocab_size * labels + largest_gradient + _head_sums(setup)
    backward = max(logits, tokens * again + largest_gradient, of_head)
    if setup.packed:  # the widest one, unpacked
        backward += wide * text.hidden_size * text.intermediate_size
    if _is_late(setup):
        backward += wide * setup.trained
    student = max(activations + backward, _filling(setup, tokens * kept))
    step: float = wide * zero.gather_bucket if zero.stage < 3 and setup.world > 1 else 0
    if not zero.offloads_optimizer and (zero.stage == 3 or setup.gradient_itemsize < 4):  # ZeRO-3 steps group by group
        step += 4 * (min(setup.shard(setup.trained), zero.sub_group) if zero.stage == 3 else setup.shard(setup.trained))
    if setup.gradient_itemsize < 4:  # beside their float32 copy; float32 gradients are that copy
        step += _copied_gradients(setup)
    moments = {"student": student + _gathered(setup, setup.held), "optimizer": step}
    if setup.latent_gradient is not None and not setup.has_whole_chain:
        moments["own latents"] = _own_latents(setup) + _gathered(setup, setup.held)
    if setup.has_teacher:
        pieces = setup.teacher_pieces
        moments["teacher" + f", in {pieces} pieces" * (pieces > 1)] = (
            _reading(setup) + _query_buffers(setup) + _gathered(setup, _teacher(setup), is_teacher=True)
        )
    vision = setup.micro_batch_size * setup.sample.patches * _vision_bytes(setup) if setup.has_tower else 0
    if setup.has_teacher:
        moments["vision, momentum update"] = vision + _update(setup)
    elif setup.has_tower:
        moments["vision"] = vision
    return moments


def _head_sums(setup: Setup) -> float:
    """Beside the head's gradient, before any activation is freed: its float32 sum over several chunks of logits, then
    its conversion to float32 for the reduction; a tied head's waits for the embedding's."""
    text = setup.geometry.text
    if setup.lora_rank or setup.itemsize == 4 or not setup.sums_in_fp32:
        return 0
    has_chunks = setup.micro_batch_size * setup.sample.labels > setup.logits_chunk
    return 4.0 * text.embedding if has_chunks or not text.is_tied else 0


def _reading(setup: Setup) -> float:
    """The teacher's forward: gated layer and residual stream of the tokens read at once; where it reads in
    pieces, also embeddings, embeddings with images, and last states of the whole window."""
    wide, text = setup.itemsize, setup.geometry.text
    window = setup.window_samples * setup.sample.tokens
    at_once = window * setup.micro_batches_read_together / setup.grad_accum_steps
    running = at_once * (3 * wide * text.intermediate_size + (8 + 3 * wide) * text.hidden_size)
    return running + (3 * wide * text.hidden_size * window if setup.teacher_pieces > 1 else 0)


def _query_buffers(setup: Setup) -> float:
    """The teacher's attention of prompts on their images, in 16 bit, float32 and as softmax: the most that it can be,
    where half of a prompt's tokens are its images'."""
    text, sample = setup.geometry.text, setup.sample
    half = max(0, sample.tokens - sample.labels) / 2
    return 10 * min(QUERY_ELEMENTS, setup.window_samples * text.heads * half**2)


def _own_latents(setup: Setup) -> float:
    """The rollout without gradients: keys and values, unless CUDA graphs hold them, and one layer at a time."""
    text, wide = setup.geometry.text, setup.itemsize
    held = 0 if setup.records_latents else 2 * text.layers * text.kv_heads * text.head_dim
    running = 3 * text.intermediate_size + 4 * text.hidden_size
    return wide * setup.micro_tokens * (held + running)


def _is_late(setup: Setup) -> bool:
    """Whether no gradient is complete before the backward ends: all layers are called repeatedly."""
    return setup.has_whole_chain or setup.passes > 1


def _copied_gradients(setup: Setup) -> float:
    """A rank's part of the gradients, which ZeRO-1 and 2 copy into one buffer as they arrive, and again in 16 bit for
    the optimizer; not if the sum is that buffer (ZeRO-2 in float32) or lies on the host, which counts it."""
    zero = setup.zero
    is_copied = zero.stage == 1 or (zero.stage == 2 and setup.gradient_itemsize == setup.itemsize)
    if zero.offloads_optimizer or not is_copied:
        return 0
    return setup.gradient_itemsize * setup.shard(setup.trained)


def _filling(setup: Setup, of_layer: float) -> float:
    """While gradients are copied as they arrive: the whole buffer exists from the first full bucket on, on the last
    rank beside the activations of most layers, `of_layer` bytes each. A tied head's gradient is late."""
    wide, text = setup.itemsize, setup.geometry.text
    part = _copied_gradients(setup)
    if not part:
        return 0
    if text.is_tied and not setup.lora_rank:
        part += wide * text.embedding
    if _is_late(setup):
        return part + wide * setup.trained
    behind = -(-setup.zero.reduce_bucket // text.layer)
    return part + max(0, text.layers - behind) * of_layer


def _keeps_weights(setup: Setup) -> bool:
    """Whether ZeRO-3 gathers the student's weights once a step, not at each use."""
    return setup.zero.stage == 3 and setup.world > 1 and setup.zero.persistence_threshold >= setup.held


def _gathered(setup: Setup, weights: int, is_teacher: bool = False) -> float:
    """Weights that ZeRO-3 holds whole during a forward: live ones and those being prefetched.

    On one rank a shard is the whole: nothing is gathered, but weights on the host are copied.
    """
    is_sharded = is_teacher or setup.zero.stage == 3
    comes_from_host = setup.teacher_offload == "cpu" if is_teacher else setup.zero.offloads_weights
    if not is_sharded or (setup.world == 1 and not comes_from_host) or (not is_teacher and _keeps_weights(setup)):
        return 0
    return setup.itemsize * min(weights, setup.zero.max_live + setup.zero.prefetch_bucket)


def _vision_bytes(setup: Setup) -> float:
    """Per patch in the tower, without gradients: gated layer and residual stream, or the pixels being converted."""
    vision, wide = setup.geometry.vision, setup.itemsize
    return max(wide * (3 * vision.intermediate_size + 5 * vision.hidden_size), (8 + wide) * vision.patch_inputs)


def _teacher(setup: Setup) -> int:
    text = setup.geometry.text
    return text.language_model + text.adapters(setup.lora_rank, setup.lora_targets)


def _averaged(setup: Setup) -> int:
    """Weights that the momentum update averages."""
    return setup.trained if setup.lora_rank else setup.geometry.text.language_model


def _host(setup: Setup) -> dict[str, float]:
    terms: dict[str, float] = {"process": HOST_PROCESS, "loader processes": setup.num_workers * HOST_WORKER}
    if setup.zero.offloads_weights:
        terms["student's weights"] = setup.itemsize * setup.shard(setup.held)
    if setup.zero.offloads_optimizer:
        per_weight = setup.gradient_itemsize + 4 + 4 + optimizer_bytes(setup.optimizer)
        terms["float32 weights, gradients and moments"] = per_weight * setup.shard(setup.trained)
    if setup.has_teacher and setup.teacher_offload == "cpu":
        terms["teacher's weights"] = _pinned(setup, setup.itemsize, piece=None)
        if setup.lora_rank:
            terms["teacher's averages"] = setup.average_itemsize * setup.shard(_averaged(setup))
        else:
            terms["teacher's averages"] = _pinned(setup, setup.average_itemsize, piece=2**24)
    return terms


def _pinned(setup: Setup, itemsize: int, piece: int | None) -> float:
    """The teacher's shards in pinned memory, which torch allocates in powers of two; matrices only, the rest is a
    thousandth of that. piece: most elements of one allocation."""
    text = setup.geometry.text
    matrices = [(text.embedding, 1), *((inputs * outputs, text.layers) for inputs, outputs in text.linears.values())]
    total = 0
    for count, times in matrices:
        mine = -(-count // setup.world)
        whole, rest = divmod(mine, piece) if piece else (0, mine)
        allocated = whole * _power_of_two((piece or 0) * itemsize) + _power_of_two(rest * itemsize)
        total += times * allocated
    return total


def _power_of_two(size: int) -> int:
    """The smallest one that is not less; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def _checkpoint_copy(setup: Setup) -> float:
    per_weight = 4 + optimizer_bytes(setup.optimizer)
    averages = 4 * setup.shard(_averaged(setup)) if setup.has_teacher else 0
    return per_weight * setup.shard(setup.trained) + averages
