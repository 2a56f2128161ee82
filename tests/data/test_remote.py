"""Rows elsewhere are read as those on disk are; credentials stay in the environment, and what fails is one line."""

from __future__ import annotations

import gzip
import io
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest

from lorafit.data import remote, scan
from lorafit.errors import DataError, RecipeError
from lorafit.recipe import load
from support.sources import CHATML, PAIR, json_lines, prepared, rows_of, section, word_tokenizer
from support.tiny import sums, write_jsonl

SECRET = "hunter2hunter2"


class Server:
    """The files of a directory at 127.0.0.1, what was asked for, and how often each answer fails first."""

    def __init__(self, directory: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.failures: dict[str, list[int]] = {}
        self.tags = True
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(super().do_GET)

            def do_HEAD(self) -> None:
                self._answer(super().do_HEAD)

            def _answer(self, answer: Any) -> None:
                server.asked[f"{self.command} {self.path}"] += 1
                left = server.failures.get(self.path.partition("?")[0])
                if left:
                    self.send_error(left.pop(0))
                else:
                    answer()

            def end_headers(self) -> None:
                path = Path(self.translate_path(self.path))
                if server.tags and path.is_file():
                    self.send_header("ETag", f'"{hash(path.read_bytes())}"')
                super().end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def downloads(self, name: str) -> int:
        return sum(count for asked, count in self.asked.items() if asked.startswith("GET") and name in asked)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "site").mkdir()
    running = Server(tmp_path / "site")
    yield running
    running.close()


def problem(url: str) -> str:
    with pytest.raises(DataError) as error:
        scan(section(url), seed=0)
    (found,) = error.value.problems
    assert error.value.exit_code == 3 and "\n" not in str(found)
    return str(found)


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(PAIR, PAIR).encode()),
        ("a.json", json.dumps([PAIR, PAIR]).encode()),
        ("a.jsonl.gz", gzip.compress(json_lines(PAIR, PAIR).encode(), mtime=0)),
        ("a.csv", b"prompt,completion\na,b\nc,d\n"),
        ("a.parquet", parquet_bytes([PAIR, PAIR])),
    ],
)
def test_every_kind_of_file_is_read_over_http(tmp_path: Path, server: Server, name: str, content: bytes) -> None:
    (tmp_path / "site" / name).write_bytes(content)
    found = scan(section(f"{server.url}/{name}"), seed=0)
    assert found.train_rows == 2 and len(rows_of(found)) == 2
    assert found.files == (f"{server.url}/{name}",)


def test_the_tokens_are_those_of_the_same_file_on_disk(tmp_path: Path, server: Server) -> None:
    path = write_jsonl(tmp_path / "site" / "a.jsonl", sums(50))
    here, there = (prepared(section(where), word_tokenizer(CHATML)) for where in (path, f"{server.url}/a.jsonl"))
    assert here.train["input_ids"][:] == there.train["input_ids"][:]
    assert here.fingerprint == there.fingerprint


def test_a_file_is_downloaded_once_and_not_again_by_a_second_start(tmp_path: Path, server: Server) -> None:
    write_jsonl(tmp_path / "site" / "a.jsonl", sums(50))
    data, cache = section(f"{server.url}/a.jsonl"), tmp_path / "cache"
    first = prepared(data, word_tokenizer(CHATML), cache_dir=cache)
    assert server.downloads("a.jsonl") == 1
    again = prepared(data, word_tokenizer(CHATML), cache_dir=cache)
    assert server.downloads("a.jsonl") == 1 and again.fingerprint == first.fingerprint
    write_jsonl(tmp_path / "site" / "a.jsonl", sums(50, first=7))
    assert prepared(data, word_tokenizer(CHATML), cache_dir=cache).fingerprint != first.fingerprint
    assert sorted(entry.name for entry in cache.iterdir() if len(entry.name) != 64) == ["digests"]


def test_without_entity_tags_a_file_that_was_just_written_is_looked_at_again(tmp_path: Path, server: Server) -> None:
    server.tags = False
    write_jsonl(tmp_path / "site" / "a.jsonl", sums(5))
    data, cache = section(f"{server.url}/a.jsonl"), tmp_path / "cache"
    for expected in (1, 2):
        prepared(data, word_tokenizer(CHATML), cache_dir=cache)
        assert server.downloads("a.jsonl") == expected


def test_what_fails_for_a_moment_is_asked_for_again(tmp_path: Path, server: Server) -> None:
    (tmp_path / "site" / "a.jsonl").write_text(json_lines(PAIR))
    server.failures["/a.jsonl"] = [503]
    assert scan(section(f"{server.url}/a.jsonl"), seed=0).train_rows == 1


def test_what_is_not_there_or_may_not_be_read_is_one_line_and_asked_for_once(server: Server) -> None:
    assert (
        problem(f"{server.url}/none.jsonl") == f"{server.url}/none.jsonl: does not exist there (404); check the address"
    )
    server.failures["/secret.jsonl"] = [403] * 9
    said = problem(f"{server.url}/secret.jsonl")
    assert "may not be read" in said and "credentials come from the environment: ~/.netrc" in said
    assert max(server.asked.values()) <= 2


def test_a_refused_connection_and_a_name_that_nobody_has_are_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "cannot be read" in problem(f"http://127.0.0.1:{port}/a.jsonl")
    assert "check the address and the network" in problem("http://nobody.invalid/a.jsonl")


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SECONDS_OF_SILENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "does not answer" in problem(f"http://127.0.0.1:{silent.getsockname()[1]}/a.jsonl")


def test_a_page_where_a_file_should_be_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "site" / "a.jsonl").write_text("<!DOCTYPE html><html>log in</html>")
    assert "is an HTML page, not data" in problem(f"{server.url}/a.jsonl")


@pytest.fixture
def bucket() -> Iterator[str]:
    """A directory of fsspec's own file system in memory, which has names as a bucket has."""
    fs = fsspec.filesystem("memory")
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def put(url: str, text: str) -> None:
    with fsspec.open(url, "w") as file:
        file.write(text)


def test_globs_and_directories_of_a_bucket_are_read_in_order(bucket: str) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "README.md"):
        put(f"{bucket}/rows/{name}", json_lines({"prompt": name, "completion": "x"}))
    put(f"{bucket}/rows/c.csv", "prompt,completion\nc.csv,x\n")
    assert [row.prompt for row in rows_of(scan(section(f"{bucket}/rows/*.jsonl"), seed=0))] == ["a.jsonl", "b.jsonl"]
    assert [row.prompt for row in rows_of(scan(section(f"{bucket}/rows"), seed=0))] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert "matches no file" in problem(f"{bucket}/rows/*.parquet")


def test_another_split_in_a_bucket_is_refused_as_on_disk(bucket: str) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        put(f"{bucket}/rows/{name}", json_lines(PAIR))
    said = problem(f"{bucket}/rows")
    assert "holds held-out rows (test.jsonl)" in said and "path: memory:///bucket/rows/train.jsonl," in said


def test_a_protocol_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert problem("gs://bucket/a.jsonl") == "gs://bucket/a.jsonl: needs gcsfs; pip install gcsfs"
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert problem("https://host/a.jsonl") == "https://host/a.jsonl: needs aiohttp; pip install 'lorafit[http]'"
    assert "Protocol not known" in problem("nonsense://bucket/a.jsonl")
    assert "chains protocols" in problem("zip://a.jsonl::https://host/a.zip")
    assert "is no URL; write https://" in problem("https:/host/a.jsonl")


def recipe(folder: Path, path: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"model: {{model_name_or_path: a/b}}\ndata:\n  train:\n    - path: {json.dumps(path)}\n")
    return file


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/a.jsonl",
        f"https:/user:{SECRET}@host/a.jsonl",
        f"https://{SECRET}@host/a.jsonl",
        f"s3://key:{SECRET}@bucket/a.jsonl",
        f"https://host/a.jsonl?X-Amz-Algorithm=A&X-Amz-Signature={SECRET}",
        f"https://host/a.jsonl?sv=1&sig={SECRET}",
        f"https://host/a.jsonl?X-Goog-Credential={SECRET}",
        f"https://host/a.jsonl?access_token={SECRET}",
    ],
)
def test_credentials_in_an_address_are_refused_before_anything_prints_them(tmp_path: Path, url: str) -> None:
    for overrides in ((), (f"data.train.0.path={url}",)):
        with pytest.raises(RecipeError) as error:
            load(recipe(tmp_path, url if not overrides else "a.jsonl"), overrides=overrides)
        assert "data.train.0.path: holds what looks like a token or password" in str(error.value)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a.jsonl", "https://host:8080/a@2x.jsonl?download=true", "hf://datasets/a/b@main/c.jsonl"]
)
def test_an_address_stays_as_it_was_written(tmp_path: Path, url: str) -> None:
    loaded = load(recipe(tmp_path, url))
    assert loaded.recipe.data.train[0].path == url
    assert url in loaded.yaml(relative_to=tmp_path / "run")


def test_queries_are_not_shown() -> None:
    assert remote.shown_url(f"https://user:x@host/a.jsonl?key={SECRET}#{SECRET}") == "https://host/a.jsonl"
    error = OSError(f"404, message='', url='https://store/x?X-Amz-Signature={SECRET}'")
    assert SECRET not in remote._clean(error)


def test_rows_in_a_bucket_are_read_with_the_credentials_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not among the test packages: botocore needs a python-dateutil older than the pinned one.
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        fsspec.filesystem("s3").mkdir("bucket")
        for name in ("a", "b"):
            put(f"s3://bucket/{name}.jsonl", json_lines(*sums(5)))
        made = prepared(section("s3://bucket/*.jsonl"), word_tokenizer(CHATML), cache_dir=tmp_path)
        assert len(made.train) == 10 and made.files == ("s3://bucket/a.jsonl", "s3://bucket/b.jsonl")
        assert "does not exist there" in problem("s3://bucket/none.jsonl")
        assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*.json"))
    finally:
        running.stop()
