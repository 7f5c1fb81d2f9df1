"""Within the block, and only there, what is saved below a directory is handed over."""

import pickle
import threading
import zipfile

import pytest
import torch

from aiockpt.integrations.handing_over import handed_over

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saves():
    return []


@pytest.fixture
def save(saves):
    return lambda state, path, metadata: saves.append((state, path, metadata))


def test_saves_below_the_directory_are_handed_over(tmp_path, save, saves):
    state = {"w": torch.ones(2)}

    with handed_over(str(tmp_path), save):
        torch.save(state, tmp_path / "sub/a.pt")
        safetensors.save_file(state, f"{tmp_path}/b.safetensors", metadata={"k": "v"})

    assert [(path, metadata) for _, path, metadata in saves] == [
        ("sub/a.pt", None),
        ("b.safetensors", {"k": "v"}),
    ]
    assert all(taken is state for taken, *_ in saves)
    assert list(tmp_path.iterdir()) == []


def test_saves_elsewhere_are_written_as_ever(tmp_path, save, saves):
    (tmp_path / "in").mkdir()

    with handed_over(f"{tmp_path}/in", save):
        torch.save({}, tmp_path / "in.pt")
        with open(tmp_path / "in" / "stream.pt", "wb") as stream:
            torch.save({}, stream)
        torch.save({}, tmp_path / "in" / "old.pt", _use_new_zipfile_serialization=False)
        torch.save({}, f=tmp_path / "in" / "named.pt")
        torch.save(obj={}, f=tmp_path / "in" / "both.pt")
        torch.save({}, tmp_path / "in" / "pickled.pt", pickle)
        safetensors.save_file({}, filename=f"{tmp_path}/in/named.safetensors")

    assert saves == []
    assert len(list(tmp_path.rglob("*.pt"))) == 6
    assert (tmp_path / "in/named.safetensors").exists()


def test_a_name_that_says_another_container_is_left_to_who_saves(tmp_path, save, saves):
    state = {"w": torch.ones(2)}
    with handed_over(str(tmp_path), save):
        torch.save(state, tmp_path / "a.safetensors")
        safetensors.save_file(state, tmp_path / "b.st", metadata={"k": "v"})
    assert saves == []
    assert zipfile.is_zipfile(tmp_path / "a.safetensors")
    assert safetensors.load_file(tmp_path / "b.st")["w"].tolist() == [1, 1]


def test_a_block_within_a_block_takes_what_is_its_own(tmp_path, save, saves):
    inner: list[object] = []

    with handed_over(f"{tmp_path}/out", save):
        with handed_over(f"{tmp_path}/in", lambda *taken: inner.append(taken)):
            torch.save(1, tmp_path / "in/a.pt")
            torch.save(2, tmp_path / "out/b.pt")
        torch.save(3, tmp_path / "out/c.pt")

    assert inner == [(1, "a.pt", None)]
    assert saves == [(2, "b.pt", None), (3, "c.pt", None)]


def test_saves_of_other_threads_are_written_as_ever(tmp_path, save, saves):
    with handed_over(str(tmp_path), save):
        other = threading.Thread(target=torch.save, args=({}, tmp_path / "a.pt"))
        other.start()
        other.join()

    assert saves == []
    assert (tmp_path / "a.pt").exists()


def test_after_the_block_everything_is_as_it_was(tmp_path, save):
    before = torch.save, safetensors.save_file

    with pytest.raises(ZeroDivisionError), handed_over(str(tmp_path), save):
        raise ZeroDivisionError

    assert (torch.save, safetensors.save_file) == before
