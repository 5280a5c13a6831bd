"""The authors' format, and everything that can be wrong with its records."""

import pytest

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from tests.data.packing import image_bytes
from tests.ingest.records import LATENT, TEXT, ilvr, read


def test_ilvr_record(root):
    plan = [LATENT, TEXT, {"type": "latent", "helper_image": "c.png"}, TEXT, TEXT]
    record = ilvr(id=7, image_input=["c.png", "a.png"], sequence_plan=plan, original_final_answer="70°", seen=[1])
    (sample,) = read(root, record)
    look = TextStep("Look.")
    assert sample == Sample(
        id="7",
        question="Why?",
        steps=(LatentStep(0), look, LatentStep(1), look, look),
        input_images=(image_bytes(2), image_bytes(0)),
        helper_images=(image_bytes(1), image_bytes(2)),
        answer="70°",
        meta={"seen": "[1]"},
    )


def test_a_latent_step_may_say_which_region_it_is_about(root):
    plan = [LATENT | {"region": [1, 2, 8, 5.5]}, LATENT | {"region": None}, LATENT]
    (sample,) = read(root, ilvr(sequence_plan=plan))
    assert sample.steps == (LatentStep(0, (1, 2, 8, 5.5)), LatentStep(1), LatentStep(2))


def test_other_keys_of_a_step_are_free_and_empty_ones_say_nothing(root):
    plan = [LATENT | {"content": None, "note": "x"}, TEXT | {"helper_image": "", "region": None}]
    (sample,) = read(root, ilvr(sequence_plan=plan))
    assert sample.steps == (LatentStep(0), TextStep("Look."))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text_input": ', "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (ilvr(text_input=...), "missing key 'text_input'"),
        (ilvr(text_input=" \n"), "'text_input' is empty"),
        (ilvr(text_input=["x"]), "'text_input' is a list"),
        (ilvr(sequence_plan=...), "missing key 'sequence_plan'"),
        (ilvr(sequence_plan="x"), "'sequence_plan' is text"),
        (ilvr(sequence_plan=[TEXT, "x"]), "step 2 of the plan: it is text"),
        (ilvr(sequence_plan=[{"type": "text", "content": " "}]), "step 1 of the plan: 'content' is empty"),
        (ilvr(sequence_plan=[{"type": "latent"}]), "step 1 of the plan: missing key 'helper_image'"),
        (ilvr(sequence_plan=[TEXT | {"type": "txt"}]), "unknown type 'txt'; did you mean 'text'?"),
        (ilvr(sequence_plan=[LATENT | {"helper_image": "no.png"}]), "helper image 'no.png' is missing below"),
        (ilvr(text_input="<image> <image>"), "2 <image> markers in the question but 1 input images"),
        (
            ilvr(sequence_plan=[LATENT | {"region": "all"}]),
            "step 1 of the plan: 'region' is \"all\", expected [left",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"region": [0, 0, 1, True]}]),
            "'region' is [0, 0, 1, true], expected [left",
        ),
        (
            ilvr(sequence_plan=[TEXT, LATENT | {"region": [0, 0, 9, 6]}]),
            "step 2 of the plan: region [0, 0, 9, 6] is",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"region": [0.1, 0.2, 0.5, 1]}]),
            "step 1 of the plan: 'region' is [0.1, 0.2, 0.5, 1], which looks like fractions; expected pixels",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"region": [0, 0, 1.004, 1]}]),
            "step 1 of the plan: 'region' is [0, 0, 1.004, 1], which looks like fractions; expected pixels",
        ),
        (
            ilvr(sequence_plan=[LATENT, TEXT | {"helper_image": "b.png"}]),
            "step 2 of the plan: it has 'helper_image', which is for steps of type latent, but is of type text",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"content": "Look."}]),
            "step 1 of the plan: it has 'content', which is for steps of type text, but is of type latent",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"regions": [1, 1, 5, 5]}]),
            "step 1 of the plan: unknown key 'regions'; did you mean 'region'?",
        ),
        (ilvr(sequence_plan=[{"type": "text", "content": "See <image>."}]), "the plan's text holds <image>"),
        (ilvr(image_input=["a.png", 3]), "'image_input' holds a number"),
        (ilvr(image_input=""), "'image_input' holds an empty path"),
        (ilvr(image_input="no.png"), "input image 'no.png' is missing below"),
        (ilvr(image_input="."), "not a file"),
        (ilvr(image_input="a\0.png"), "no file can have this name"),
        (ilvr(image_input="\ud800.png"), "no file can have this name"),
        (ilvr(image_input="x" * 5000), "cannot be read"),
        (ilvr(original_final_answer={"a": 1}), "'original_final_answer' is an object"),
        (ilvr(id=[1]), "'id' is a list"),
        (ilvr(id=float("nan")), "'id' is nan"),
        (ilvr(original_final_answer=float("nan")), "'original_final_answer' is nan"),
        (ilvr(answer=float("-inf")), "'answer' is -inf"),
        (b'{"text_input": "x", "sequence_plan": [], "answer": 1e999}', "'answer' is inf"),
        (ilvr(image_input=..., image_inputs="a.png"), "unknown key 'image_inputs'; did you mean 'image_input'"),
        (ilvr(original_answer="A"), "unknown key 'original_answer'; did you mean 'original_final_answer'"),
    ],
)
def test_rejected_ilvr_records(root, record, reason):
    good, bad, after = read(root, ilvr(), record, ilvr(), format="ilvr")
    assert isinstance(good, Sample) and isinstance(after, Sample)
    assert (bad.line, bad.id) == (2, "train-2")
    assert reason in bad.reason
    assert "\n" not in bad.reason
