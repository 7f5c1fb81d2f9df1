"""The command line, in this process and as users start it."""

import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from aiockpt import sync
from aiockpt.cli import app, verification

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.ones(4, dtype=torch.bfloat16),
    "step": 3,
}
TIED = torch.zeros(5, dtype=torch.int64)


def save(root, tag, **files):
    with sync.CheckpointEngine(root, {"host_cache_size": 1 / 128}) as engine:
        engine.create(tag)
        for name, state in files.items():
            engine.save(state, name.replace("_", "."))
        engine.commit(tag)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    save(root, "step-1", model_pt=STATE)
    save(root, "step-2", model_pt=STATE, tied_pt={"a": TIED, "b": TIED})
    return root


def run(*args, answer=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=answer)


def result_of(*args, status=0):
    result = run(*args, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def complaint_of(*args, status=1):
    """The one line that a command that fails leaves."""
    result = run(*args)
    assert result.exit_code == status
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    return line


def flip(path, needle):
    """Flips one bit in the file, in the first byte of `needle`."""
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


# --- ls -------------------------------------------------------------------------


def test_ls_lists_tags_oldest_first_and_marks_the_latest(root):
    head, *rows = run("ls", root).stdout.splitlines()
    assert head.split() == ["tag", "age", "bytes", "files"]
    assert [row.split()[0] for row in rows] == ["step-1", "step-2"]
    assert ["latest" in row for row in rows] == [False, True]


def test_ls_as_json_says_what_the_engine_says(root):
    listing = result_of("ls", root)
    with sync.CheckpointEngine(root) as engine:
        tags = engine.tags()
    assert listing["latest"] == "step-2"
    assert [tag["tag"] for tag in listing["tags"]] == [info.tag for info in tags]
    assert [tag["nbytes"] for tag in listing["tags"]] == [info.nbytes for info in tags]
    assert [len(tag["files"]) for tag in listing["tags"]] == [1, 2]


def test_ls_of_an_empty_directory_lists_nothing_and_makes_nothing(tmp_path):
    assert result_of("ls", tmp_path) == {
        "root": str(tmp_path),
        "latest": None,
        "tags": [],
    }
    assert list(tmp_path.iterdir()) == []


# --- inspect --------------------------------------------------------------------


def test_inspect_shows_key_dtype_shape_and_bytes_of_every_tensor(root):
    (file,) = result_of("inspect", root / "step-1")["files"]
    shown = {
        tensor["key"]: (tensor["dtype"], tensor["shape"], tensor["nbytes"])
        for tensor in file["tensors"]
    }
    assert shown == {
        "weight": ("float32", [2, 3], 24),
        "bias": ("bfloat16", [4], 8),
    }
    assert file["num_objects"] == 1
    assert file["nbytes"] == (root / "step-1/model.pt").stat().st_size
    table = run("inspect", root / "step-1").stdout
    for text in ("weight", "float32", "[2, 3]", "24", "2 tensors"):
        assert text in table


def test_inspect_says_which_tensors_share_a_record_and_counts_it_once(root):
    (file,) = result_of("inspect", root / "step-2/tied.pt")["files"]
    assert [tensor["shared_with"] for tensor in file["tensors"]] == [None, "a"]
    assert (file["tensor_bytes"], file["record_bytes"]) == (80, 40)
    assert "shared with a" in run("inspect", root / "step-2/tied.pt").stdout


def test_inspect_of_a_tag_shows_all_its_files(root):
    found = result_of("inspect", root / "step-2")
    assert found["tag"] == "step-2"
    assert [file["path"] for file in found["files"]] == ["model.pt", "tied.pt"]


def test_files_that_torch_and_safetensors_wrote_can_be_inspected(tmp_path):
    torch.save(STATE, tmp_path / "plain.pt")
    save_file({"weight": STATE["weight"]}, tmp_path / "plain.safetensors")
    for name in ("plain.pt", "plain.safetensors"):
        (file,) = result_of("inspect", tmp_path / name)["files"]
        assert file["tensors"][0]["key"] == "weight"


def test_inspect_of_a_root_asks_for_a_tag(root):
    assert "neither a file nor a tag" in complaint_of("inspect", root)


# --- plain files ------------------------------------------------------------------


@pytest.fixture
def plain(root):
    """A tag with texts beside the weights; the second looks like safetensors."""
    with sync.CheckpointEngine(root, {"host_cache_size": 1 / 128}) as engine:
        engine.create("plain")
        engine.save(STATE, "model.pt")
        engine.save_bytes("no checkpoint", "notes.txt")
        engine.save_bytes('{"a": 1,{', "index.json")
        engine.commit("plain")
    return root / "plain"


def test_a_plain_file_as_it_was_written_is_sound(plain):
    assert result_of("verify", plain)["faults"] == []


@pytest.mark.parametrize("name", ["notes.txt", "index.json"])
def test_verify_names_a_plain_file_with_a_flipped_bit(plain, name):
    flip(plain / name, (plain / name).read_bytes()[-1:])
    (fault,) = result_of("verify", plain, status=1)["faults"]
    assert fault["path"].endswith(name)


def test_inspect_shows_plain_files_of_a_tag_without_tensors(plain):
    files = {file["path"]: file for file in result_of("inspect", plain)["files"]}
    assert files["notes.txt"]["container"] == "plain"
    assert files["index.json"]["tensors"] == []
    assert files["index.json"]["nbytes"] == 9
    assert files["model.pt"]["tensors"]
    assert "plain" in run("inspect", plain).stdout
    flip(plain / "model.pt", b"PK")
    assert "neither a torch zip" in complaint_of("inspect", plain)


def test_diff_compares_the_tensors_beside_plain_files(plain):
    assert run("diff", plain, plain.parent / "step-1").exit_code == 0
    flip(plain / "model.pt", b"PK")
    assert "neither a torch zip" in complaint_of("diff", plain, plain)


# --- verify ---------------------------------------------------------------------


def test_verify_of_a_sound_root_reads_every_file_and_ends_well(root):
    found = result_of("verify", root)
    assert found["faults"] == []
    assert found["tags"] == ["step-1", "step-2"]
    sizes = [path.stat().st_size for path in root.glob("*/*.pt")]
    assert (found["num_files"], found["nbytes"]) == (3, sum(sizes))
    assert "all sound" in run("verify", root).stdout


def test_a_link_to_a_tag_is_none_when_a_root_is_verified(root):
    (root / "best").symlink_to("step-2")
    found = result_of("verify", root)
    assert (found["faults"], found["tags"]) == ([], ["step-1", "step-2"])


def test_a_tag_that_is_replaced_while_it_is_verified_is_verified_anew(
    root, monkeypatch
):
    opened = verification.opened
    replaced: list[str] = []

    def open_late(directory: Path, path: str) -> Any:
        if not replaced:
            replaced.append(path)
            with sync.CheckpointEngine(root) as engine:
                engine.create("step-1", overwrite=True)
                engine.save({"other": torch.ones(9)}, "other.pt")
                engine.commit("step-1")
        return opened(directory, path)

    monkeypatch.setattr(verification, "opened", open_late)
    found = result_of("verify", root)
    assert replaced
    assert (found["faults"], found["tags"]) == ([], ["step-1", "step-2"])


@pytest.mark.parametrize("place", ["", "step-1", "step-1/model.pt"])
def test_verify_names_the_file_and_the_tensor_of_a_flipped_bit(root, place):
    path = root / "step-1/model.pt"
    flip(path, STATE["weight"].numpy().tobytes())
    (fault,) = result_of("verify", root / place, status=1)["faults"]
    assert fault["path"] == str(path)
    assert fault["key"] == "weight"
    line = complaint_of("verify", root / place)
    assert str(path) in line
    assert "'weight'" in line


def test_verify_of_a_tag_sees_a_sound_file_that_is_another(root):
    path = root / "step-1/model.pt"
    other = {**STATE, "weight": STATE["weight"] + 1}
    torch.save(other, path)
    size = path.stat().st_size
    assert run("verify", path).exit_code == 0
    assert str(size) in complaint_of("verify", root / "step-1")


def test_verify_of_a_tag_compares_the_checksum_of_the_whole_file(root):
    # Another step: a file that is sound in itself, and of the same length.
    path = root / "step-1/model.pt"
    save(root, "other", model_pt={**STATE, "step": 4})
    shutil.copyfile(root / "other/model.pt", path)
    assert run("verify", path).exit_code == 0
    assert "CRC-32" in complaint_of("verify", root / "step-1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["missing", "short", "long", "empty"],
)
def test_verify_finds_a_file_that_is_missing_or_of_another_length(root, damage):
    path = root / "step-2/tied.pt"
    damage(path)
    (fault,) = result_of("verify", root, status=1)["faults"]
    assert fault["path"] == str(path)


def test_verify_finds_a_manifest_that_was_changed(root):
    path = root / "step-1/.aiockpt/manifest.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    (fault,) = result_of("verify", root, status=1)["faults"]
    assert fault["path"] == str(root / "step-1")
    assert "checksum" in fault["message"]


def test_verify_goes_on_after_a_fault(root):
    (root / "step-1/model.pt").unlink()
    (root / "step-2/tied.pt").unlink()
    found = result_of("verify", root, status=1)
    assert len(found["faults"]) == 2
    assert found["num_files"] == 3


def test_verify_of_a_directory_without_tags_fails(tmp_path):
    assert "no published tag" in complaint_of("verify", tmp_path)


# --- diff -----------------------------------------------------------------------


def difference_of(tmp_path, a, b, status=1):
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return result_of("diff", tmp_path / "a.pt", tmp_path / "b.pt", status=status)


def test_diff_of_equal_tensors_ends_well_and_counts_them(root):
    found = result_of("diff", root / "step-1/model.pt", root / "step-2/model.pt")
    assert found["is_same"]
    assert found["num_equal"] == 2


def test_diff_tells_what_only_one_side_has_what_changed_and_what_differs(tmp_path):
    a = {
        "gone": torch.zeros(1),
        "wider": torch.zeros(2),
        "cast": torch.zeros(2),
        "other": torch.zeros(2),
        "same": torch.zeros(2),
    }
    b = {
        "wider": torch.zeros(3),
        "cast": torch.zeros(2, dtype=torch.int32),
        "other": torch.tensor([0.0, 1.0]),
        "same": torch.zeros(2),
        "new": torch.zeros(1),
    }
    found = difference_of(tmp_path, a, b)
    assert found["only_in_a"] == ["gone"]
    assert found["only_in_b"] == ["new"]
    assert found["changed"] == [
        {"key": "wider", "a": "float32 (2,)", "b": "float32 (3,)"},
        {"key": "cast", "a": "float32 (2,)", "b": "int32 (2,)"},
    ]
    assert found["different"] == ["other"]
    assert found["num_equal"] == 1
    lines = run("diff", tmp_path / "a.pt", tmp_path / "b.pt").stdout.splitlines()
    assert [line[0] for line in lines] == ["-", "+", "!", "!", "~", "1"]


def test_diff_compares_bytes_and_not_numbers(tmp_path):
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert difference_of(tmp_path, {"x": nan}, {"x": nan.clone()}, 0)["is_same"]
    assert difference_of(tmp_path, {"x": zero}, {"x": -zero})["different"] == ["x"]


def test_diff_compares_elements_and_not_how_they_are_laid_out(tmp_path):
    square = torch.arange(9.0).reshape(3, 3)
    transposed = square.t()
    # The same record, read in two ways.
    assert not difference_of(tmp_path, {"x": square}, {"x": transposed})["is_same"]
    # Two records, read as the same elements.
    plain = transposed.contiguous()
    assert difference_of(tmp_path, {"x": transposed}, {"x": plain}, 0)["is_same"]
    whole = torch.arange(12.0)
    assert difference_of(tmp_path, {"x": whole[2:5]}, {"x": whole[2:5].clone()}, 0)[
        "is_same"
    ]


def test_diff_does_not_blame_a_tensor_for_bytes_beside_it(tmp_path):
    one, other = torch.zeros(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
    found = difference_of(
        tmp_path,
        {"low": one[:2], "high": one[2:]},
        {"low": other[:2], "high": other[2:]},
    )
    assert found["different"] == ["high"]


def test_diff_compares_across_containers_and_without_checksums(tmp_path):
    tensors = {"weight": STATE["weight"], "bias": STATE["bias"]}
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({**tensors, "bias": tensors["bias"] + 1}, tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert result_of("diff", tmp_path / "a.pt", a)["num_equal"] == 2
    assert result_of("diff", a, b, status=1)["different"] == ["bias"]


def test_diff_of_tags_puts_the_file_before_the_key(root):
    found = result_of("diff", root / "step-1", root / "step-2", status=1)
    assert found["only_in_b"] == ["tied.pt:a", "tied.pt:b"]
    assert found["num_equal"] == 2


def test_diff_knows_the_parts_of_sparse_tensors(tmp_path):
    one = torch.eye(3).to_sparse()
    found = difference_of(tmp_path, {"x": one}, {"x": one * 2})
    assert found["different"] == ["x#1"]


def test_diff_reads_no_further_than_a_damaged_tensor(tmp_path):
    torch.save({"x": torch.zeros(64)}, tmp_path / "a.pt")
    torch.save({"x": torch.full((64,), 7.0)[:63]}, tmp_path / "b.pt")
    torch.save({"x": torch.full((80,), 7.0)[:63]}, tmp_path / "c.pt")
    flip(tmp_path / "b.pt", torch.full((8,), 7.0).numpy().tobytes())
    line = complaint_of("diff", tmp_path / "b.pt", tmp_path / "c.pt")
    assert "b.pt" in line


def test_a_file_and_a_tag_cannot_be_compared(root):
    line = complaint_of("diff", root / "step-1", root / "step-1/model.pt")
    assert "not a tag and a file" in line


# --- rm and sweep ---------------------------------------------------------------


def tags_of(root):
    return [tag["tag"] for tag in result_of("ls", root)["tags"]]


def test_rm_asks_and_removes_only_after_a_yes(root):
    assert run("rm", root, "step-1", answer="n\n").exit_code == 1
    assert tags_of(root) == ["step-1", "step-2"]
    assert run("rm", root, "step-1", answer="y\n").exit_code == 0
    assert tags_of(root) == ["step-2"]


def test_rm_with_yes_does_not_ask_and_moves_latest(root):
    result = run("rm", root, "step-2", "--yes")
    assert result.exit_code == 0
    assert "?" not in result.output
    assert result_of("ls", root)["latest"] == "step-1"
    assert not (root / "step-2").exists()


def test_rm_of_an_unknown_tag_names_the_known_ones(root):
    line = complaint_of("rm", root, "step-9", "--yes")
    assert "step-1, step-2" in line


def test_rm_removes_a_damaged_tag_too(root):
    (root / "step-1/.aiockpt/manifest.json").write_text("{}")
    assert "damaged" in run("rm", root, "step-1", "--yes").stdout
    assert not (root / "step-1").exists()


def test_sweep_removes_what_dead_engines_left_and_reports_it(root):
    attempt = root / ".aiockpt/work/host-1-dead/1"
    attempt.mkdir(parents=True)
    (attempt / "model.pt").write_bytes(b"x" * 1000)
    assert result_of("sweep", root) == {
        "root": str(root),
        "engines": ["host-1-dead"],
        "nbytes": 1000,
    }
    assert not attempt.exists()
    assert run("sweep", root).stdout == "nothing to remove\n"
    assert tags_of(root) == ["step-1", "step-2"]


def test_sweep_leaves_the_work_of_a_live_engine(root):
    with sync.CheckpointEngine(root) as engine:
        engine.create("step-3")
        engine.save(STATE, "model.pt")
        assert result_of("sweep", root)["engines"] == []
        engine.commit("step-3")
    assert tags_of(root)[-1] == "step-3"


# --- errors and output ----------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "sweep"])
def test_what_is_not_there_is_one_line_and_status_1(command, tmp_path):
    assert "nowhere" in complaint_of(command, tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02."])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_checkpoint_is_one_line_and_status_1(command, content, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    result = run(command, path)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "file.pt" in result.stderr


@pytest.mark.parametrize("args", [["ls"], ["ls", "a", "b"], ["nope"], ["ls", "--x"]])
def test_wrong_usage_is_status_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.path)!r}).mkdir()",)


def test_no_command_runs_code_from_a_checkpoint(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"x": torch.ones(2), "bomb": Bomb(mark)}, tmp_path / "bomb.pt")
    pickle.loads(pickle.dumps(Bomb(mark)))  # The bomb works.
    mark.rmdir()
    for args in (["inspect"], ["verify"], ["diff", tmp_path / "bomb.pt"]):
        assert run(*args, tmp_path / "bomb.pt").exit_code == 0
    assert not mark.exists()


def test_names_from_files_cannot_steer_the_terminal(tmp_path):
    torch.save({"\x1b[31mred\x07\n[bold]": torch.ones(2)}, tmp_path / "evil.pt")
    text = run("inspect", tmp_path / "evil.pt").stdout
    assert "\x1b" not in text
    assert r"\x1b[31mred\x07\n[bold]" in text


def test_a_key_that_is_no_text_for_a_file_is_escaped(tmp_path):
    torch.save({"\ud800": torch.ones(2)}, tmp_path / "odd.pt")
    assert r"\ud800" in run("inspect", "--json", tmp_path / "odd.pt").stdout


def test_long_rows_are_not_broken_off_a_terminal(tmp_path):
    key = "layer." * 60 + "weight"
    torch.save({key: torch.ones(2)}, tmp_path / "long.pt")
    (row,) = [
        line
        for line in run("inspect", tmp_path / "long.pt").stdout.splitlines()
        if key in line
    ]
    assert "float32" in row


# --- as users start it ----------------------------------------------------------


def command(*args):
    return [sys.executable, "-m", "aiockpt", *map(str, args)]


def environment(**changes):
    """This process's, without what would decide about colours."""
    deciding = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"}
    kept = {name: value for name, value in os.environ.items() if name not in deciding}
    return kept | changes


def start(*args):
    return subprocess.run(
        command(*args), capture_output=True, text=True, check=False, env=environment()
    )


def test_the_module_is_the_command_and_writes_no_colour_into_a_pipe(root):
    done = start("verify", root)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_a_failure_leaves_one_line_and_no_traceback(tmp_path):
    done = start("verify", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def on_terminal(*args, **changes):
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            command(*args),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(TERM="xterm", **changes),
        )
        os.close(theirs)
        with process:
            text = b""
            try:
                while part := terminal.read(4096):
                    text += part
            except OSError:  # Linux says so that the other end has closed.
                pass
    assert process.returncode == 0
    return text.decode()


GREEN = "\x1b[32m"


def test_a_terminal_gets_colours_unless_no_colour_is_asked_for(root):
    assert GREEN in on_terminal("verify", root)
    assert GREEN not in on_terminal("verify", root, NO_COLOR="1")
