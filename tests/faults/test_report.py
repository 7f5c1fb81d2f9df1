"""The page of the results tells all of them, and hides no row that is missing."""

import json

import pytest

from faults.matrix import ROWS
from faults.report import LOST, REPOSITORY, SEEN, TOOLS, kept, page, problems, write

ABOUT = ("commit", "date", "cores", "kernel", "python", "torch", "safetensors")
WHOLE = [
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
    {
        "unflushed": "ext4",
        "contender": "aiockpt",
        "saves": 2,
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
    (found,) = problems([*WHOLE, {**WHOLE[0], "survived": 6}])

    assert "not survived" in found


def test_an_ordinary_count_is_told():
    (found,) = problems([*WHOLE, {**WHOLE[0], "run": "ordinary"}])

    assert "long" in found


@pytest.mark.parametrize(
    "record", [{"failed": "a test", "topics": []}, {**WHOLE[0], "cases": 0}]
)
def test_a_test_that_failed_or_tried_nothing_is_told(record):
    assert list(problems([*WHOLE, record]))


@pytest.mark.parametrize("key", LOST)
def test_a_loss_of_aiockpt_is_told(key):
    (found,) = problems([*WHOLE, {**WHOLE[-2], key: 1}])

    assert "lost by aiockpt" in found


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page of some records for each of several files, and how writing it ended."""
    monkeypatch.setattr("faults.report.REPOSITORY", tmp_path)
    monkeypatch.setattr("faults.report.RESULTS", tmp_path)

    def written(*parts):
        paths = [
            tmp_path / f"faults_{9 - number}cores_{number}_known.jsonl"
            for number in range(len(parts))
        ]
        for path, records in zip(paths, parts, strict=True):
            first = {"machine": dict.fromkeys(ABOUT, f"known of {path.name}")}
            lines = (json.dumps(record) + "\n" for record in [first, *records])
            path.write_text("".join(lines))
        target = tmp_path / "faults.md"
        try:
            write(target)
        except SystemExit as error:
            return target.read_text(), str(error)
        return target.read_text(), ""

    return written


def test_the_page_is_written_even_where_something_was_not_survived(written):
    records = [*WHOLE, {**WHOLE[0], "fault": "another", "survived": 6}]
    text, error = written(records)
    assert "another" in error
    assert "| another |" in text
    assert f"{7 * len(TOOLS) + 6} of {7 * len(TOOLS) + 7} cases" in text


def test_a_fault_is_that_of_the_last_part_that_has_it(written):
    first, *others = WHOLE
    other_fault = {**first, "fault": "another", "cases": 5, "survived": 5}
    again = [{**first, "cases": 70, "survived": 70}]
    text, error = written([{**first, "survived": 3}, other_fault, *others], again)
    assert error == ""
    assert "| 70 | 70 |" in text
    assert "| 5 | 5 |" in text
    assert "| 7 | 3 |" not in text
    rows = ", ".join(map(str, sorted(TOOLS)))
    assert f"faults_9cores_0_known.jsonl; rows {rows} and peers.\n" in text
    assert f"faults_8cores_1_known.jsonl; rows {first['row']}.\n" in text


def test_what_has_to_be_known_of_results_stands_below_them(written):
    text, error = written([*WHOLE, {"note": "half of it"}], WHOLE[:1])
    assert error == ""
    assert " and peers.\n    - half of it\n" in text


def test_results_that_were_replaced_are_not_named(written):
    text, error = written([*WHOLE, {"failed": "a test", "topics": []}], WHOLE)
    assert error == ""
    assert "faults_9cores_0_known.jsonl" not in text


def test_a_failure_stands_until_all_that_it_was_about_was_run_again(written):
    topics = [[each["row"], each["fault"]] for each in WHOLE[:2]]
    first = [*WHOLE, {"failed": "a test", "topics": topics}]
    text, error = written(first, WHOLE[:1])
    assert "a test" in text
    assert "a test" in error
    text, error = written(first, WHOLE[:2])
    assert "a test" not in text + error


FAILED = {"failed": "a test", "topics": []}
PARTS = {
    "of which some stands": [[*WHOLE, FAILED], WHOLE[:1]],
    "that has nothing else": [WHOLE, [FAILED]],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_test_that_failed_in_a_part_is_told(written, parts):
    text, error = written(*parts)
    assert "a test" in text
    assert "a test" in error


def test_every_row_of_the_matrix_has_its_tool():
    assert ROWS.keys() <= TOOLS.keys()


def test_the_page_of_the_docs_is_that_of_the_results_that_are_kept(request):
    if request.config.getoption("--faults-report", default=None) is not None:
        pytest.skip("results are being made")
    assert (REPOSITORY / "docs" / "faults.md").read_text() == page(kept())
