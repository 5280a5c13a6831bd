"""The tokenizer with the latent tokens, and folders that hold another one or none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ilvr_ds.data.tokens import ABSENT, LATENT_TOKENS, load_tokenizer
from ilvr_ds.errors import UserError
from tests.golden_set import DEFAULT

PROCESSOR = DEFAULT / "processor"


def test_latent_tokens_follow_the_vocabulary_in_their_order() -> None:
    """The authors' checkpoint has its embeddings in this order."""
    before = len(AutoTokenizer.from_pretrained(PROCESSOR))
    tokenizer, special = load_tokenizer(str(PROCESSOR))
    ids = [special.latent_pad, special.latent_start, special.latent_end]
    assert ids == list(range(before, before + 3))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]


def test_a_tokenizer_that_has_them_keeps_its_ids(tmp_path: Path) -> None:
    """An exported model brings them along: added twice they would point past the embedding."""
    tokenizer, special = load_tokenizer(str(PROCESSOR))
    tokenizer.save_pretrained(tmp_path)
    again, special_again = load_tokenizer(str(tmp_path))
    assert special_again == special and len(again) == len(tokenizer)


def test_ids_are_the_tokenizers_own() -> None:
    tokenizer, special = load_tokenizer(str(PROCESSOR))
    names = {"im_start": "<|im_start|>", "im_end": "<|im_end|>", "image_pad": "<|image_pad|>", "pad": "<|endoftext|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    assert {key: tokenizer.decode([getattr(special, key)]) for key in names} == names


def test_a_latent_token_in_a_text_is_one_token() -> None:
    tokenizer, special = load_tokenizer(str(PROCESSOR))
    ids = tokenizer("is" + "".join(LATENT_TOKENS) + "is", add_special_tokens=False)["input_ids"]
    assert ids[1:4] == [special.latent_pad, special.latent_start, special.latent_end] and ids[0] == ids[4]


def test_all_that_is_marked_special_is_listed(tmp_path: Path) -> None:
    """No text may hold a listed token. Catches tokens that were added later, and in transformers 5.17 all of a
    tokenizer that version 4 wrote: a question could open another turn."""
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR)
    tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(tmp_path)
    found, _ = load_tokenizer(str(tmp_path))
    assert {"<|mine|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>"} <= set(found.all_special_tokens)
    assert not {"<plain>", *LATENT_TOKENS} & set(found.all_special_tokens)
    assert len(found) == len(tokenizer) + len(LATENT_TOKENS)


def test_a_tokenizer_can_stay_without_latent_tokens() -> None:
    """The base before training. Catches ids that point past its embedding, or at another token."""
    before = len(AutoTokenizer.from_pretrained(PROCESSOR))
    tokenizer, special = load_tokenizer(str(PROCESSOR), add_latent_tokens=False, without_latents=True)
    assert len(tokenizer) == before and not special.has_latents
    assert (special.latent_pad, special.latent_start, special.latent_end) == (ABSENT,) * 3
    known = load_tokenizer(str(PROCESSOR))[1]
    assert known.has_latents and (special.im_end, special.image_pad) == (known.im_end, known.image_pad)


def test_a_tokenizer_with_some_latent_tokens_is_a_users_mistake(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR)
    tokenizer.add_tokens([LATENT_TOKENS[0]], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks <\|latent_start\|>, <\|latent_end\|>: "):
        load_tokenizer(str(tmp_path), add_latent_tokens=False, without_latents=True)


def test_a_folder_without_a_tokenizer_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at") as caught:
        load_tokenizer(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_another_models_tokenizer_is_a_users_mistake(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks <\|vision_start\|>, <\|vision_end\|>, <\|image_pad\|>"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_a_users_mistake(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(str(tmp_path))


TURN = "<|im_start|>{{ m['role'] }}\n%s<|im_end|>\n"
PARTS = "{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' }}{% endfor %}"
TEMPLATES = {
    "joined": (TURN % "{{ '' + m['content'] }}", r"a text \(can only concatenate str"),
    "printed": (TURN % "{{ m['content'] }}", r"a text \(it prints the message as Python does"),
    "left out": (TURN % "{{ m['text'] }}", r"a text \(the user's words are not there"),
    "refused": ("{{ raise_exception('Only text') }}", r"a text \(Only text"),
    "undefined": (TURN % "{{ m['words']['text'] }}", r"a text \('dict object' has no attribute 'words'"),
    "broken": ("{% for %}", r"a text \("),
    "no images": (TURN % f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{PARTS}{{% endif %}}",
                  r"an image \(0 of <\|image_pad\|> for 1 image"),
    "other turns": ("[INST]{{ m['content'][-1]['text'] }}<|im_end|>[/INST]", r"a text \(the answer does not stand"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_for_text_alone_is_a_users_mistake(name: str, tmp_path: Path) -> None:
    """LLaMA-Factory writes such: a traceback of jinja, or a sample packed as Python prints a list."""
    body, message = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR)
    tokenizer.chat_template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the chat template at '{tmp_path}' cannot say {message}") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
