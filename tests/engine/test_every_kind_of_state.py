"""Every kind of state goes through the whole engine and comes back the same."""

import io
import zipfile

import pytest
import torch

import aiockpt
from equality import assert_same_state
from states import ALL_STATES

every_state = pytest.mark.parametrize("name", ALL_STATES)
# torch warns of what it makes itself: of dtypes, and when it maps a file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]


def saved_by_torch(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def record_sizes(data: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [entry.file_size for entry in file.infolist()]


def without_serialization_id(data: bytes) -> bytes:
    """The file with its random identity, and the checksums of that, blanked."""
    name = "archive/.data/serialization_id"
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        identity, crc32 = file.read(name), file.getinfo(name).CRC.to_bytes(4, "little")
    return data.replace(identity, bytes(40)).replace(crc32, bytes(4))


@every_state
async def test_plain_torch_loads_what_the_engine_saved(name, tmp_path):
    state = ALL_STATES[name]()
    expected = torch.load(io.BytesIO(saved_by_torch(state)), weights_only=False)

    await aiockpt.save(state, tmp_path / "state.pt")

    loaded = torch.load(tmp_path / "state.pt", weights_only=False)
    assert_same_state(loaded, expected)
    mapped = torch.load(tmp_path / "state.pt", weights_only=False, mmap=True)
    assert_same_state(mapped, expected)
    assert_same_state(
        await aiockpt.load(tmp_path / "state.pt", weights_only=False), expected
    )


@every_state
async def test_a_file_is_byte_for_byte_what_torch_writes(name, tmp_path):
    state = ALL_STATES[name]()
    path = tmp_path / "state.pt"

    await aiockpt.save(state, path)

    ours, torchs = path.read_bytes(), saved_by_torch(state)
    if record_sizes(ours) == record_sizes(torchs):
        assert without_serialization_id(ours) == without_serialization_id(torchs)
    else:
        # Torch wrote bytes that no tensor refers to.
        assert sum(record_sizes(ours)) < sum(record_sizes(torchs))
