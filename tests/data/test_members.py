"""What a stretch of a tar may hold."""

import gzip
import io
import json
import re
import tarfile
from dataclasses import replace

import pytest

from ilvr_ds.data.members import MemberError, decode_members, encode_members, key_of, walk_members
from ilvr_ds.data.sample import LatentStep, Sample, SampleError, TextStep, Turn
from tests.data.hostile import tar_of
from tests.data.packing import image_bytes, make_sample

KEY = key_of(12)


def stored(sample: Sample) -> dict[str, bytes]:
    return {f"{KEY}.{extension}": data for extension, data in sorted(encode_members(sample).items())}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("plan", [True, False])
def test_a_sample_survives(kind, plan):
    sample = make_sample(3, kind=kind, plan=plan)
    assert decode_members(tar_of(stored(sample)), KEY) == sample


def test_more_than_ten_images_keep_their_order():
    """Members lie in the tar sorted by name: in10 before in2."""
    images = tuple(image_bytes(shade) for shade in range(12))
    sample = Sample("x", "?", (TextStep("a"),), input_images=images)
    assert decode_members(tar_of(stored(sample)), KEY) == sample


@pytest.mark.parametrize("region", [(0, 0, 8, 6), (1.5, 0, 2, 5.25)])
def test_a_region_survives(region):
    sample = replace(make_sample(3), steps=(LatentStep(0, region),))
    assert decode_members(tar_of(stored(sample)), KEY) == sample


def test_a_conversation_survives():
    history = (Turn("system", "Kurz."), Turn("user", "Was?"), Turn("assistant", "猫"))
    sample = replace(make_sample(0), history=history)
    assert decode_members(tar_of(stored(sample)), KEY) == sample
    assert b'"history"' not in encode_members(make_sample(0))["json"], "other samples are stored as before"


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ((Turn("user", "a"),), "do not alternate"),
        ((Turn("assistant", "a"), Turn("user", "b")), "do not alternate"),
        ((Turn("user", "a"), Turn("assistant", "b"), Turn("system", "c")), "a system turn that is not the first"),
        ((Turn("user", "a"), Turn("assistant", " ")), "a turn is empty"),
        ((Turn("user", "\ud800"), Turn("assistant", "b")), "not valid Unicode"),
        ((Turn("user", "<image>"), Turn("assistant", "b")), "1 <image> markers in the user's turns but 2 input images"),
    ],
)
def test_a_conversation_that_does_not_fit_together_is_refused(history, fault):
    with pytest.raises(SampleError, match=fault):
        encode_members(replace(make_sample(0), history=history))


def test_samples_without_regions_are_stored_as_before():
    assert b"region" not in encode_members(make_sample(3))["json"]


@pytest.mark.parametrize("region", [(0, 0, 9, 6), (-1, 0, 2, 2), (3, 0, 3, 2), (0, 5, 2, 4), (float("nan"), 0, 2, 2)])
def test_a_region_that_is_empty_or_outside_its_image_is_refused(region):
    with pytest.raises(SampleError, match=r"step 2 of the plan: region \[.*\] is no box .* helper image of 8x6 pixels"):
        encode_members(replace(make_sample(3), steps=(TextStep("a"), LatentStep(0, region))))


@pytest.mark.parametrize("name", [f"{KEY}.pkl", f"{KEY}.in0.pyd", f"{KEY}.json.gz", f"../{KEY}.json", "__meta__.json"])
def test_other_members_are_refused_and_named(name):
    with pytest.raises(MemberError, match=r"is not allowed") as error:
        decode_members(tar_of(stored(make_sample(3)) | {name: b"cos\nsystem\n"}), KEY)
    assert name in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.XHDTYPE])
def test_only_plain_files_are_members(kind):
    """A sparse member of 1 KB may expand to gigabytes, an extended header may rename what follows."""
    with pytest.raises(MemberError, match=r"is not allowed"):
        decode_members(tar_of(stored(make_sample(3)), type=kind), KEY)


def test_compressed_bytes_are_not_inflated():
    with pytest.raises(MemberError, match=r"damaged header at byte 0"):
        decode_members(gzip.compress(tar_of(stored(make_sample(3))) + bytes(1024)), KEY)


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_member_is_noticed(lost):
    members = stored(make_sample(3))
    assert len(members) == 4
    del members[list(members)[lost]]
    with pytest.raises(MemberError, match=r"missing|images .* expected"):
        decode_members(tar_of(members), KEY)


def test_a_flipped_header_byte_in_the_middle_is_noticed():
    data = bytearray(tar_of(stored(make_sample(3))))
    second = walk_members(bytes(data))[1].start
    data[second + 3] ^= 1
    with pytest.raises(MemberError, match=f"damaged header at byte {second}"):
        decode_members(bytes(data), KEY)


def test_headers_are_read_as_tarfile_reads_them():
    """Whatever stands in them, and whatever was read before: each byte changed, with and without a new checksum."""
    data = tar_of(stored(make_sample(3)))
    walk_members(data)
    changed = [
        data[:place] + bytes([new]) + data[place + 1 : 512] for place in range(512) for new in (0, 0x20, 0x37, 0xE9)
    ]
    for header in [*changed, *map(with_checksum, changed)]:
        try:
            wanted = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            with pytest.raises(MemberError, match=re.escape(f"damaged header at byte 0 ({error})")):
                walk_members(header + data[512:])
            continue
        if wanted.type != tarfile.REGTYPE or not re.fullmatch(
            r"\d{10}\.(json|(in|helper)\d\.(png|jpg|webp))", wanted.name
        ):
            with pytest.raises(MemberError, match=re.escape(f"member {wanted.name!r} at byte 0 is not allowed")):
                walk_members(header + data[512:])
        else:
            found = walk_members(header + bytes(-(-wanted.size // 512) * 512))[0]
            assert (found.name, found.size) == (wanted.name, wanted.size)


def with_checksum(header):
    """The header with the checksum that belongs to it."""
    total = 256 + sum(header[:148]) + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def test_a_cut_member_other_keys_and_empty_blocks_are_noticed():
    data = tar_of(stored(make_sample(3)))
    with pytest.raises(MemberError, match=r"is cut off"):
        decode_members(data[:-512], KEY)
    with pytest.raises(MemberError, match=f"the bytes hold {KEY}, expected"):
        decode_members(data, key_of(13))
    with pytest.raises(MemberError, match=r"expected one whole sample"):
        decode_members(data + bytes(512), KEY)
    with pytest.raises(MemberError, match=r"two members have one name"):
        decode_members(data + tar_of({f"{KEY}.json": b"{}"}), KEY)
    with pytest.raises(MemberError, match=r"the bytes hold nothing"):
        decode_members(b"", KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"id": 3},
        {"steps": 3},
        {"steps": [{"type": "text"}]},
        {"steps": [{"type": "latent"}] * 2},
        {"steps": [{"type": "latent", "region": [0, 0, 9, 9]}]},
        {"steps": [{"type": "latent", "region": [0, 0, 1]}]},
        {"steps": [{"type": "latent", "region": ["0", "0", "1", "1"]}]},
        {"meta": [1]},
        {"meta": {"a": 1}},
        {"answer": None},
        {"question": "<image>"},
    ],
)
def test_damaged_text_is_one_clear_error(change):
    members = stored(make_sample(3))
    members[f"{KEY}.json"] = json.dumps(json.loads(members[f"{KEY}.json"]) | change).encode()
    with pytest.raises(MemberError, match=r"text of the sample is damaged"):
        decode_members(tar_of(members), KEY)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"3", b"\xff", b'{"images": 3}', b"{}"])
def test_hostile_json_is_one_clear_error(text):
    with pytest.raises(MemberError, match=r"damaged"):
        decode_members(tar_of({f"{KEY}.json": text}), KEY)


def test_samples_that_cannot_be_stored():
    with pytest.raises(SampleError, match=r"neither JPEG, PNG nor WebP"):
        encode_members(Sample("x", "?", (), input_images=(image_bytes(kind="GIF"),)))
    with pytest.raises(SampleError, match=r"not valid Unicode"):
        encode_members(Sample("x", "\ud800", ()))
    with pytest.raises(SampleError, match=r"more than 10,000 images"):
        encode_members(Sample("x", "?", (), input_images=(image_bytes(),) * 10_001))


def test_what_is_written_is_an_ordinary_tar():
    stream = io.BytesIO(tar_of(stored(make_sample(3))) + bytes(1024))
    with tarfile.open(fileobj=stream) as tar:
        assert tar.getnames() == list(stored(make_sample(3)))
