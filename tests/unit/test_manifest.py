"""A manifest is read back as it was written or not at all; names stay inside."""

import os
import posixpath
from pathlib import PurePosixPath

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.manifest import (
    FORMAT_VERSION,
    PRIVATE_DIR,
    FileEntry,
    Manifest,
    TagInfo,
    check_path,
    check_tag,
    decode,
    encode,
)

TAG_DIR = "/data/runs/step-1"

# Characters that file systems, URLs and pickled names trip over, and any others.
NASTY = st.sampled_from("./\\\0\n\r \t~:*?\"'<>|%\x7f\x85\xa0\u2028\ud800é日😀aZ0-_")
NAMES = st.text(NASTY | st.characters(), max_size=40)
PATHS = st.lists(st.sampled_from(["..", ".", "", PRIVATE_DIR, "a"]) | NAMES).map(
    "/".join
)
U63 = st.integers(min_value=0, max_value=2**63 - 1)


def accepts(check, *args: object) -> bool:
    try:
        check(*args)
    except InvalidArgumentError:
        return False
    return True


PLAIN_PATHS = NAMES.filter(lambda name: accepts(check_path, name, [])).map(
    lambda name: check_path(name, [])
)
ENTRIES = st.builds(
    FileEntry, path=PLAIN_PATHS, nbytes=U63, crc32=st.integers(0, 2**32 - 1), rank=U63
)
MANIFESTS = st.builds(
    Manifest,
    tag=st.text(max_size=20).filter(lambda tag: accepts(check_tag, tag)),
    attempt=st.text("abc.0123-", min_size=1),
    published_ns=U63,
    world_size=st.integers(1, 10_000),
    files=st.lists(ENTRIES, max_size=5).map(tuple),
    versions=st.dictionaries(st.text("abc"), st.text("0123.+", max_size=9), max_size=3),
)


def some_manifest(*paths: str) -> Manifest:
    return Manifest(
        tag="step-1",
        attempt="host-7-00ff.1",
        published_ns=1_700_000_000_000_000_000,
        world_size=2,
        files=tuple(
            FileEntry(path=path, nbytes=1 << 33, crc32=0xDEADBEEF, rank=number)
            for number, path in enumerate(paths)
        ),
        versions={"aiockpt": "0.1.0", "torch": "2.13.0"},
    )


# --- the file ---------------------------------------------------------------------


@given(MANIFESTS)
def test_a_manifest_comes_back_as_it_was_written(manifest):
    back = decode(encode(manifest), "m")

    assert msgspec.structs.replace(back, crc32=0) == manifest
    assert encode(back) == encode(manifest)


def test_a_manifest_is_text_that_people_can_read():
    text = encode(some_manifest("model.pt")).decode("ascii")

    assert text.endswith("}\n")
    assert msgspec.json.decode(text)["files"][0]["path"] == "model.pt"


def test_every_single_byte_that_changes_is_detected():
    data = encode(some_manifest("model.pt", "sub/opt.safetensors"))

    for at, value in enumerate(data):
        # A bit each, and the two bytes that JSON is most tolerant of.
        for wrong in {*(value ^ 1 << bit for bit in range(8)), 0x20, 0x30} - {value}:
            changed = data[:at] + bytes([wrong]) + data[at + 1 :]
            with pytest.raises(CorruptCheckpointError):
                decode(changed, "m")


def test_every_truncation_and_every_addition_is_detected():
    data = encode(some_manifest("model.pt"))

    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            decode(data[:length], "m")
    for tail in (b"\n", b" ", b"\0", b"{}", data):
        with pytest.raises(CorruptCheckpointError):
            decode(data + tail, "m")


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"format_version":1,"files":' + b"[" * 100_000)
@example(b'{"format_version":' + b"9" * 5000 + b"}")
@example(b'{"format_version":1.0}')
@example(b"\xef\xbb\xbf{}")
@example(b"\xff\xfe{\0}\0")
@example(b"null")
def test_foreign_bytes_are_never_a_manifest(data):
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(data, "/root/t/m.json")
    assert caught.value.path == "/root/t/m.json"
    assert "/root/t/m.json" in str(caught.value)


def test_a_newer_format_says_so():
    newer = msgspec.structs.replace(some_manifest("a"), format_version=2)

    with pytest.raises(
        CorruptCheckpointError, match=f"format 2 is not {FORMAT_VERSION}"
    ):
        decode(encode(newer), "m")


def test_an_unknown_field_is_refused():
    fields = msgspec.json.decode(encode(some_manifest("a")))
    data = msgspec.json.encode(fields | {"surprise": 1})

    with pytest.raises(CorruptCheckpointError, match="surprise"):
        decode(data, "m")


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", ".aiockpt/manifest.json"],
)
def test_a_manifest_that_names_a_file_outside_its_tag_is_refused(path):
    with pytest.raises(CorruptCheckpointError, match="m:"):
        decode(encode(some_manifest("model.pt", path)), "m")


def test_a_manifest_adds_its_files_up():
    manifest = some_manifest("a", "b", "c")

    info = TagInfo.of(manifest)

    assert manifest.nbytes == info.nbytes == 3 << 33
    assert (info.tag, info.world_size) == ("step-1", 2)
    assert info.published_ns == manifest.published_ns
    assert info.files == manifest.files


# --- tags -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["step-100", "global_step5", "a", "1", "v1.0", "x y", "é日😀", "x" * 255]
)
def test_ordinary_tags_are_taken(tag):
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag",
    [
        "", ".", "..", ".hidden", "a/b", "/", "/abs", "a/", "../a", "a\\b", "nul\0",
        "two\nlines", "tab\t", "\x1b[31m", "latest", "latest.1", "x" * 256, "é" * 128,
        "\ud800", " a", "a ", "a\xa0", "\u2028a", None, 5, b"bytes", ["a"],
    ],
)  # fmt: skip
def test_a_tag_that_is_no_plain_directory_name_is_refused(tag):
    with pytest.raises(InvalidArgumentError):
        check_tag(tag)


@given(NAMES)
def test_a_tag_that_is_taken_is_one_name_that_the_pointer_file_can_hold(tag):
    if not accepts(check_tag, tag):
        return

    full = os.path.normpath(os.path.join("/root", tag))
    assert os.path.dirname(full) == "/root"
    assert os.path.basename(full) == tag
    assert not tag.startswith(".")
    assert len(os.fsencode(tag)) <= 255
    # As DeepSpeed reads it, too.
    assert f"{tag}\n".encode().decode().strip() == tag


# --- paths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "relative"),
    [
        ("model.pt", "model.pt"),
        ("sub/opt.pt", "sub/opt.pt"),
        ("./model.pt", "model.pt"),
        ("a//b/./c.pt", "a/b/c.pt"),
        ("..a/b..", "..a/b.."),
        ("sub/.aiockpt", "sub/.aiockpt"),
        (PurePosixPath("sub/model.pt"), "sub/model.pt"),
        (f"{TAG_DIR}/model.pt", "model.pt"),
        (f"{TAG_DIR}//sub/../model.pt", "model.pt"),
        (PurePosixPath(TAG_DIR, "sub", "model.pt"), "sub/model.pt"),
        ("/link/step-1/model.pt", "model.pt"),
    ],
)
def test_a_path_inside_the_tag_is_taken_relative_to_it(path, relative):
    assert check_path(path, [TAG_DIR, "/link/step-1"]) == relative


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "./", "..", "../x", "a/..", "a/../b", "a/../../b", "a/", "/", "/abs.pt",
        TAG_DIR, f"{TAG_DIR}/", f"{TAG_DIR}/..", f"{TAG_DIR}/../step-2/x", f"{TAG_DIR}x/y",
        f"/{TAG_DIR}/x", "/data/runs/step-2/x", f"{TAG_DIR}/.aiockpt/x",
        ".aiockpt", ".aiockpt/manifest.json", "./.aiockpt/x", "a\\..\\b", "nul\0.pt",
        "two\nlines", "x" * 256, "sub/" + "é" * 128, "\ud800", b"model.pt", None, 5,
    ],
)  # fmt: skip
def test_a_path_that_is_no_file_inside_the_tag_is_refused(path):
    with pytest.raises(InvalidArgumentError):
        check_path(path, [TAG_DIR])


@given(PATHS | PATHS.map(lambda path: f"{TAG_DIR}/{path}"))
@example(f"{TAG_DIR}/a/../../step-1/b")
def test_no_path_that_is_taken_leads_out_of_the_tag(path):
    if not accepts(check_path, path, [TAG_DIR]):
        return

    relative = check_path(path, [TAG_DIR])

    assert relative == posixpath.normpath(relative)
    assert not relative.startswith(("/", f"{PRIVATE_DIR}/"))
    assert relative not in {"", ".", "..", PRIVATE_DIR}
    assert ".." not in relative.split("/")
    assert os.path.normpath(f"{TAG_DIR}/{relative}") == f"{TAG_DIR}/{relative}"
    assert all(0 < len(os.fsencode(name)) <= 255 for name in relative.split("/"))
    assert "\0" not in relative
    assert check_path(relative, [TAG_DIR]) == relative


def test_a_refused_absolute_path_says_where_the_tag_is():
    with pytest.raises(InvalidArgumentError, match=TAG_DIR):
        check_path("/tmp/model.pt", [TAG_DIR])  # noqa: S108 - never opened
