"""Answers of a model with random weights: a decoding step, a prompt read, memory, and many answers of mixed length.

    python -m tests.bench.decode                        # on a GPU: 7B, bf16
    python -m tests.bench.decode --check                # a small model: are recorded steps right on this device?
    python -m tests.bench.decode --geometry tiny --side 84 --prompt 60 --rows 1 4 --samples 8 --new 12 24 --context 80

Prompts have a picture; answers have three segments of 8 latents. Each line is printed as soon as it is measured, and
one that fails says so and leaves the others alone. The plain loop and transformers' own `generate` stand beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.evaluation.pixels import replay_cost
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.decoder import Program
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.kernels import use_kernels
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.prefill import in_passes, read_prompts
from ilvr_ds.generation.refill import Refill, Request
from ilvr_ds.generation.room import bytes_of_answers, bytes_of_weights
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.model.injection import last_hidden, write_images
from ilvr_ds.model.layers.fused import kernels_in_words
from tests.bench.decode_model import LATENT_SIZE, build, longer, png, prompt_of
from tests.bench.geometry import TEXT, TINY

SEGMENTS = 3
LINES = ("step", "stock-step", "prompt", "plain", "generate", "mixed", "mixed-plain", "cost", "profile")
SMALL = {**TINY, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[*TEXT, "tiny"], default="7b")
    parser.add_argument("--side", type=int, default=672, help="of the picture, in pixels")
    parser.add_argument("--prompt", type=int, default=722, help="tokens, those of the picture included")
    parser.add_argument("--context", type=int, default=1000, help="tokens that a timed step looks at")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--samples", type=int, default=1000, help="of mixed length")
    parser.add_argument("--new", type=int, nargs=2, default=[30, 400], help="least and most new tokens of these")
    parser.add_argument("--plain-rows", type=int, nargs="+", default=[1, 64], help="of the plain loop and `generate`")
    parser.add_argument("--lines", nargs="+", choices=LINES, help="only these")
    parser.add_argument("--check", action="store_true", help="only compare recorded steps with the plain loop")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    if options.check:
        check(device)
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reasoner = build(options.geometry, device, dtype)
    bench = Bench(reasoner, options)
    print(f"{options.geometry}, {dtype}, layers: {kernels_in_words(reasoner.model.model.language_model)}", flush=True)
    for line, what, measure in lines_of(bench, options):
        if options.lines is None or line in options.lines:
            shown(what, measure)


def lines_of(bench: Bench, options: argparse.Namespace) -> list[tuple[str, str, Callable[[], str]]]:
    """Of each line the kind, what it says, and how it is measured."""
    many, plain = options.rows[-1], options.plain_rows[-1]
    lines: list[tuple[str, str, Callable[[], str]]] = []
    for rows in options.rows:
        what = f"recorded step, {rows} rows, contexts of {options.context}"
        lines.append(("step", what, partial(bench.step, rows)))
        lines.append(("stock-step", f"{what}, without kernels of its own", partial(bench.step, rows, False)))
    lines += [("prompt", f"prompts read, {rows} at a time", partial(bench.prefill, rows)) for rows in (1, plain)]
    for rows in options.plain_rows:
        lines.append(("plain", f"plain loop, {rows} rows", partial(bench.plain, rows)))
        lines.append(("generate", f"transformers' generate, {rows} rows, words alone", partial(bench.stock, rows)))
    return [
        *lines,
        ("mixed", f"{options.samples} samples, {many} rows, refilled", partial(bench.mixed, many)),
        ("mixed", f"memory, {many} rows", bench.memory),
        ("mixed-plain", f"{plain} of these samples, plain loop, {plain} rows", partial(bench.mixed_plain, plain)),
        ("cost", f"an answer with 3 segments, alone and each of {many}", partial(bench.cost, many)),
        *(("profile", f"kernels of a step, {rows} rows", partial(bench.profile, rows)) for rows in options.rows),
    ]


def shown(what: str, measure: Callable[[], str]) -> None:
    """Print a line, or how it failed."""
    try:
        print(f"{what}: {measure()}", flush=True)
    except Exception:
        logging.exception("%s: failed", what)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """Each method measures one thing and says it in a line."""

    def __init__(self, reasoner: Reasoner, options: argparse.Namespace) -> None:
        self.reasoner, self.options = reasoner, options
        assert reasoner.decoder is not None
        self.decoder = reasoner.decoder
        short = prompt_of(reasoner, options.side)
        count = max(*options.rows, *options.plain_rows)
        self.prompts = [longer(reasoner, short, str(n), options.prompt) for n in range(count)]
        special = reasoner.special
        every = max(LATENT_SIZE + 4, options.new[1] // (2 * SEGMENTS))
        self.settings = GenerationSettings(
            max_new_tokens=options.new[1],
            forced={4 + n * every: special.latent_start for n in range(SEGMENTS)},
            forbidden=(special.latent_start, *reasoner.stop_ids),
        )
        draw = np.random.default_rng(0)
        self.limits = draw.integers(options.new[0], options.new[1] + 1, options.samples)
        lengths = draw.integers(max(1, options.prompt * 5 // 6), options.prompt + 1, options.samples)
        self.mixed_prompts = [longer(reasoner, short, str(n), int(length)) for n, length in enumerate(lengths)]

    @torch.inference_mode()
    def step(self, rows: int, with_kernels: bool = True) -> str:
        """A replayed step of rows that are all in use, at contexts of a length."""
        use_kernels(with_kernels)
        self.decoder.forget()
        try:
            return f"{self._time(self._rows_in_use(rows), 50) * 1e3:.2f} ms"
        finally:  # a step that fails must not leave the later lines without kernels
            use_kernels(True)
            self.decoder.forget()

    def _rows_in_use(self, rows: int) -> Callable[[], None]:
        state = self.decoder.reserve(rows, self.options.context + 300)
        first = state.first(rows)
        for part, value in (
            (first.length, self.options.context), (first.position, self.options.context), (first.limit, 10**6),
            (first.count, 0), (state.tick, 0), (first.modes.finished, 0), (first.modes.left, -1),
        ):  # fmt: skip
            part.fill_(value)
        parts = self.decoder.parts(rows, self.options.context + 1, self._program())

        def run() -> None:
            parts.whole()
            state.tick.zero_()
            first.length.fill_(self.options.context)

        return run

    def _program(self) -> Program:
        return Refill(self.decoder, self.settings).program

    def _time(self, run: Callable[[], Any], repeats: int) -> float:
        """Seconds of one, after two that do not count."""
        run()
        run()
        started = self.reasoner.now()
        for _ in range(repeats):
            run()
        return (self.reasoner.now() - started) / repeats

    @torch.inference_mode()
    def prefill(self, rows: int) -> str:
        prompts = self.prompts[:rows]

        def run() -> None:
            for members in in_passes(prompts):
                read_prompts(self.reasoner, [prompts[member] for member in members])

        seconds = self._time(run, 2)
        return f"{seconds / rows * 1e3:.1f} ms a sample of {len(prompts[0].input_ids)} tokens{self._parts(prompts)}"

    def _parts(self, prompts: list[EncodedSample]) -> str:
        """Of a single prompt: how long each part takes on the host and on the device, and the plain loop's reading."""
        if len(prompts) > 1:
            return ""
        reasoner, model = self.reasoner, self.reasoner.model.model
        window = reasoner.collate(prompts, "right")
        tokens = window.micro_batches[0].tokens
        features = reasoner.tower(window.images[0])
        embeddings = write_images(reasoner.model.get_input_embeddings()(tokens.input_ids), tokens, features)

        def layers() -> None:
            cache = DynamicCache(config=model.language_model.config)
            last_hidden(model.language_model, tokens, embeddings, cache, features)

        parts: dict[str, Callable[[], Any]] = {
            "collated": lambda: reasoner.collate(prompts, "right"),
            "tower": lambda: reasoner.tower(window.images[0]),
            "layers": layers,
            "all": lambda: read_prompts(reasoner, prompts),
            "as the plain loop": lambda: Context(reasoner, prompts, 0).prefill(),
        }
        return "".join(f"; {name} {self._time(run, 4) * 1e3:.1f}" for name, run in parts.items())

    def plain(self, rows: int) -> str:
        settings = dataclasses.replace(self.settings, max_new_tokens=min(34, self.options.new[1]))
        generator = Generator(self.reasoner, settings)
        with torch.inference_mode():
            generator.generate(self.prompts[:rows])
            speed = generator.generate(self.prompts[:rows]).speed
        step = speed.decode_s / settings.max_new_tokens
        return f"{step * 1e3:.2f} ms a step; {speed.prefill_s / rows * 1e3:.1f} ms a prompt"

    @torch.inference_mode()
    def stock(self, rows: int) -> str:
        """The difference of a long and a short answer; without pictures, for the tower stands apart here."""
        ids = torch.full((rows, self.options.prompt), 5, device=self.reasoner.device)
        short, long = 4, min(36, self.options.new[1])

        def seconds(count: int) -> float:
            def run() -> None:
                self.reasoner.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                    do_sample=False, pad_token_id=self.reasoner.special.pad,
                )  # fmt: skip

            return self._time(run, 1)

        return f"{(seconds(long) - seconds(short)) / (long - short) * 1e3:.2f} ms a step"

    def mixed(self, rows: int) -> str:
        requests = self._requests()
        if self.reasoner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        refill = Refill(self.decoder, self.settings)
        started = self.reasoner.now()
        count = sum(len(answer.tokens) for _, answer in refill(requests, rows))
        seconds = self.reasoner.now() - started
        assert count == sum(request.limit for request in requests)
        per = seconds / len(requests)
        speed = refill.speed
        return (
            f"{seconds:.1f} s, {per * 1e3:.0f} ms a sample, {count / seconds:.0f} tokens a second "
            f"(prompts {speed.prefill_s:.1f} s, decoding {speed.decode_s:.1f} s)"
        )

    def _requests(self) -> list[Request]:
        return [Request(prompt, int(limit)) for prompt, limit in zip(self.mixed_prompts, self.limits, strict=True)]

    def mixed_plain(self, rows: int) -> str:
        """A batch lasts as long as its longest answer."""
        requests = self._requests()[:rows]
        longest = max(request.limit for request in requests)
        generator = Generator(self.reasoner, dataclasses.replace(self.settings, max_new_tokens=longest))
        started = self.reasoner.now()
        with torch.inference_mode():
            generator.generate([request.prompt for request in requests])
        return f"{(self.reasoner.now() - started) / len(requests) * 1e3:.0f} ms a sample"

    def memory(self) -> str:
        decoder = self.decoder
        held = decoder.bytes_of(decoder.rows, decoder.columns)
        planned = bytes_of_weights(decoder) + bytes_of_answers(decoder, decoder.rows, decoder.columns)
        peak = torch.cuda.max_memory_allocated() if self.reasoner.device.type == "cuda" else 0
        return (
            f"peak {peak / 2**30:.2f} GiB, planned {planned / 2**30:.2f}, of them keys and values {held / 2**30:.2f} "
            f"({decoder.rows} rows of {decoder.columns})"
        )

    def cost(self, rows: int) -> str:
        """Of an answer of 160 tokens, or fewer, with three helper images of two thirds of the side."""
        special, side = self.reasoner.special, self.options.side
        length = min(160, self.options.new[1] + SEGMENTS * LATENT_SIZE)
        segment = [special.latent_start, *[special.latent_pad] * LATENT_SIZE, special.latent_end]
        words = (length - SEGMENTS * len(segment)) // SEGMENTS
        tokens = (segment + [5] * max(1, words)) * SEGMENTS
        answer = Answer("0", "", tokens, (LATENT_SIZE,) * SEGMENTS, hit_limit=True)
        helper = png(side * 2 // 3)
        sample = Sample("0", "How many remain? " * 20, (), (png(side),), helper_images=(helper,) * SEGMENTS)
        cost = replay_cost(self.reasoner, sample, answer, rows)
        return "; ".join(
            f"{way} {cost[way]['seconds']:.3f} s and {cost[way]['seconds_in_batch'] * 1e3:.1f} ms, "
            f"{cost[way]['tokens']} tokens"
            for way in ("latents", "pixels", "drawn")
        )

    @torch.inference_mode()
    def profile(self, rows: int) -> str:
        run = self._rows_in_use(rows)
        run()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
            for _ in range(3):
                run()
            self.reasoner.now()
        kernels = [event for event in profiler.key_averages() if event.self_device_time_total]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        lines = [f"{e.self_device_time_total / 3e3:8.3f} ms {e.count // 3:5d}  {e.key[:90]}" for e in kernels[:16]]
        return "\n".join([f"{sum(e.self_device_time_total for e in kernels) / 3e3:.2f} ms of kernels", *lines])


def check(device: torch.device) -> None:
    """Recorded steps beside the plain loop on a small model: in float32 every token, in bf16 most of them."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.bfloat16 and device.type == "cpu":
            continue
        reasoner = build("tiny", device, dtype, SMALL)
        prompts = [longer(reasoner, prompt_of(reasoner, 84 + 28 * (n % 3)), str(n), 60 + 11 * n) for n in range(6)]
        special = reasoner.special
        for temperature in (0.0, 1.0):
            settings = GenerationSettings(60, temperature, 0.9, forced={7: special.latent_start}, keep_latents=True)
            shown(
                f"{dtype}, temperature {temperature}",
                lambda r=reasoner, p=prompts, s=settings: compared(r, p, s),
            )
        for barred in ("image", "prompt"):
            settings = GenerationSettings(40, forced={7: special.latent_start}, keep_latents=True)
            shown(
                f"{dtype}, without sight of the {barred}",
                lambda r=reasoner, p=prompts, s=settings, b=barred: compared(r, p, s, b),
            )


def compared(reasoner: Reasoner, prompts: list[EncodedSample], settings: GenerationSettings, barred: Any = None) -> str:
    """Tokens until the first that differs, of all; by batch, and by two rows that are refilled."""
    plain = Generator(reasoner, settings, barred=barred)
    with torch.inference_mode():
        expected = plain.generate(prompts).answers
    found = {"a batch": plain(prompts).answers}
    assert reasoner.decoder is not None
    refill = Refill(reasoner.decoder, settings, barred=barred)
    refilled = dict(refill([Request(prompt, settings.max_new_tokens) for prompt in prompts], 2))
    found["two rows"] = [refilled[n] for n in range(len(prompts))]
    lines = []
    for name, answers in found.items():
        alike = sum(
            next((n for n, (a, b) in enumerate(zip(x.tokens, y.tokens, strict=False)) if a != b), len(y.tokens))
            for x, y in zip(answers, expected, strict=True)
        )
        pairs = [(x.latents[0][0], y.latents[0][0]) for x, y in zip(answers, expected, strict=True) if x.latents]
        apart = max((float((x.float() - y.float()).abs().max()) for x, y in pairs), default=float("nan"))
        lines.append(f"{name}: {alike} of {sum(len(y.tokens) for y in expected)} tokens, latents within {apart:.1e}")
    return "; ".join(lines)


if __name__ == "__main__":
    main()
