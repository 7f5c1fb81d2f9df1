"""The page of the results tells all of them, and hides no row that is missing."""

import json

import pytest

from faults.matrix import ROWS
from faults.report import LOST, SEEN, TOOLS, page, problems, write

ABOUT = ("commit", "date", "cores", "kernel", "python", "torch", "safetensors")
WHOLE = [
    {"machine": dict.fromkeys(ABOUT, "known")},
    *(
        {
            "row": row,
            "name": f"row {row}",
            "fault": "a fault",
            "cases": 7,
            "survived": 7,
            "run": "long",
        }
        for row in TOOLS
    ),
    {
        "disk": "ext4",
        "names": "new",
        "contender": "aiockpt",
        "cuts": 5,
        "acknowledged": 11,
        **dict.fromkeys(LOST, 0),
    },
    {"damage": "cut short", "contender": "other", **dict.fromkeys(SEEN, 3)},
]


def test_results_that_are_whole_have_no_problem():
    assert list(problems(WHOLE)) == []


@pytest.mark.parametrize("index", range(len(WHOLE)))
def test_a_record_that_is_missing_is_told(index):
    assert list(problems([*WHOLE[:index], *WHOLE[index + 1 :]]))


def test_a_case_that_was_not_survived_is_told():
    (found,) = problems([*WHOLE, {**WHOLE[1], "survived": 6}])

    assert "not survived" in found


@pytest.mark.parametrize("record", [{"failed": "a test"}, {**WHOLE[1], "cases": 0}])
def test_a_test_that_failed_or_tried_nothing_is_told(record):
    assert list(problems([*WHOLE, record]))


@pytest.mark.parametrize("key", LOST)
def test_a_loss_of_aiockpt_is_told(key):
    (found,) = problems([*WHOLE, {**WHOLE[-2], key: 1}])

    assert "lost by aiockpt" in found


def test_the_page_is_written_even_where_something_was_not_survived(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("faults.report.REPOSITORY", tmp_path)
    source, target = tmp_path / "results.jsonl", tmp_path / "faults.md"
    records = [*WHOLE, {**WHOLE[1], "fault": "another", "survived": 6}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))

    with pytest.raises(SystemExit, match="another"):
        write(source, target)

    text = target.read_text()
    assert text == page(records, "results.jsonl")
    assert f"{7 * len(TOOLS) + 6} of {7 * len(TOOLS) + 7} cases" in text


def test_every_row_of_the_matrix_has_its_tool():
    assert ROWS.keys() <= TOOLS.keys()
