"""Results by key in an append-only log: nothing twice, nothing lost, and other people's lines left as they are."""

import threading
from dataclasses import dataclass
from typing import Annotated

import pytest

from personatlas.persona.errors import UserError
from personatlas.persona.logs import BATCH_ROWS, ResultCache, append_lines, read_lines
from personatlas.persona.records import Bounds, JsonRecord


def test_a_result_is_found_again_by_the_next_process(tmp_path):
    path = tmp_path / "made" / "results.jsonl"
    cache = ResultCache(path)
    assert cache.get("a") is None
    assert "a" not in cache
    cache.add([{"id": "a", "value": 1}, {"id": "b", "value": 2}])
    assert cache["a"]["value"] == 1
    assert len(cache) == 2
    again = ResultCache(path)
    assert again.rows() == cache.rows() == read_lines(path)


def test_the_last_row_of_a_key_counts_and_the_log_keeps_both(tmp_path):
    path = tmp_path / "results.jsonl"
    append_lines(path, [{"id": "a", "value": 1}, {"id": "b", "value": 2}, {"id": "a", "value": 3}])
    cache = ResultCache(path)
    assert cache["a"]["value"] == 3
    assert cache.newest == {"id": "a", "value": 3}
    assert len(read_lines(path)) == 3


def test_several_fields_are_a_key_and_rows_can_be_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    cache = ResultCache(path, ("judge", "key"), keep=lambda row: row["score"] is not None)
    cache.add([{"judge": "x", "key": "a", "score": 1}, {"judge": "y", "key": "a", "score": None}])
    assert ("x", "a") in cache
    assert ("y", "a") not in cache
    assert len(read_lines(path)) == 2


def test_logs_of_other_processes_are_read_and_never_written(tmp_path):
    other = tmp_path / "other.jsonl"
    append_lines(other, [{"id": "a", "value": 1}])
    before = other.read_bytes()
    cache = ResultCache(tmp_path / "own.jsonl", also=tmp_path.glob("o*.jsonl"))
    cache.add([{"id": "b", "value": 2}])
    assert "a" in cache
    assert other.read_bytes() == before
    assert [row["id"] for row in read_lines(tmp_path / "own.jsonl")] == ["b"]


def test_without_a_path_rows_are_kept_in_memory_alone(tmp_path):
    cache = ResultCache(None, "key")
    cache.add([{"key": "a"}])
    assert "a" in cache


def test_batched_rows_are_written_together_and_all_of_them_at_the_end(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultCache(path, batched=True) as cache:
        for number in range(BATCH_ROWS + 3):
            cache.add([{"id": number}])
            assert number in cache
        assert len(read_lines(path)) >= BATCH_ROWS
    assert [row["id"] for row in read_lines(path)] == list(range(BATCH_ROWS + 3))


def test_an_exception_loses_no_batched_row(tmp_path):
    path = tmp_path / "results.jsonl"
    cache = ResultCache(path, batched=True)
    with pytest.raises(KeyError), cache:
        cache.add([{"id": "a"}, {"text": "without an id"}])
    assert read_lines(path)[0] == {"id": "a"}


def test_threads_add_whole_rows(tmp_path):
    path = tmp_path / "results.jsonl"
    cache = ResultCache(path, sync=False)
    threads = [threading.Thread(target=lambda n=n: cache.add([{"id": n}])) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["id"] for row in read_lines(path)) == list(range(20))


@dataclass(frozen=True)
class Scored(JsonRecord):
    id: str
    score: Annotated[int, Bounds(0, 3)]


def test_a_damaged_line_is_named_with_its_number_and_what_is_allowed(tmp_path):
    path = tmp_path / "results.jsonl"
    for line, said in (
        ('{"id": "b", "score": 9}', "score is 9, not a number from 0 to 3"),
        ('{"id": "b", "score": true}', "score is True, not a whole number"),
        ('{"id": "b"}', "score is missing"),
        ('{"id": ["b"], "score": 1}', r"id is a list of 1, not text"),
        ('{"id": "b", "score": 1, "id": "c"}', "'id' stands there twice"),
        ('{"id": "b", "score": NaN}', "NaN is no number of JSON"),
        ("3", "it is 3, not an object"),
        ("[" * 100_000, "nested deeper than 64 levels"),
    ):
        path.write_text('{"id": "a", "score": 1}\n' + line + '\n{"id": "c", "score": 2}\n')
        with pytest.raises(UserError, match=rf"results\.jsonl:2 is damaged: .*{said}.*delete that line"):
            ResultCache(path, schema=Scored.from_json, mend=False)


def test_damaged_lines_are_left_out_said_and_kept_aside(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    damaged = b'{"id": "a", "score": 1}\n{"id": "b", "sc\xff\n{"id": "c", "score": 2}\n'
    for aside in ("results.jsonl.damaged", "results.jsonl.damaged1"):
        path.write_bytes(damaged)
        cache = ResultCache(path, schema=Scored.from_json)
        assert [row["id"] for row in cache.rows()] == ["a", "c"]
        assert (tmp_path / aside).read_bytes() == damaged
        assert "1 damaged lines left out (line 2:" in capsys.readouterr().err
        cache.add([{"id": "b", "score": 3}])
        assert [row["id"] for row in read_lines(path)] == ["a", "c", "b"]
