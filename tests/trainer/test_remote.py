"""Shards by pattern, from web servers and object stores: found, read, and read on after a lost connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from flash_diffusion.trainer.config import DataSection, parse_recipe
from flash_diffusion.trainer.data.reading import open_source, shards
from flash_diffusion.trainer.data.reading.samples import RawSample
from flash_diffusion.trainer.data.remote import opening
from flash_diffusion.trainer.errors import UserError

from .shards import Server, serving, shard


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WAITS", (0.0, 0.0, 0.0))


def captions(path: Any) -> list[str]:
    """Return the captions of all samples, in the order of the source."""
    source = open_source(DataSection(source="webdataset", path=path))
    samples = [sample for unit in range(len(source)) for sample in source.read(unit)]
    assert all(isinstance(sample, RawSample) for sample in samples), samples
    return [sample.captions[0] for sample in samples if isinstance(sample, RawSample)]


def numbers(*ranges: range) -> list[str]:
    return [str(number) for part in ranges for number in part]


def test_local_patterns_and_lists_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"s-{number:03d}.tar").write_bytes(shard(10 * number, 2))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "{1}.tar").write_bytes(shard(500, 1))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert captions("~/s-{009..011}.tar") == numbers(range(90, 92), range(100, 102), range(110, 112))
    assert captions([str(tmp_path / "more"), "~/s-{000,002}.tar"]) == numbers(range(500, 501), range(2), range(20, 22))
    assert captions(tmp_path / "more" / "{1}.tar") == ["500"]  # a name that is there is no pattern


@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "whole files"])
def test_web_server_gives_the_samples_of_the_local_files(ranges: bool) -> None:
    files = {f"/d/s-{number}.tar": shard(10 * number, 3) for number in range(3)}
    with serving(Server(files, ranges)) as server:
        assert captions(server.url + "/d/s-{0..2}.tar?token=secret") == numbers(range(3), range(10, 13), range(20, 23))
        source = open_source(DataSection(source="webdataset", path=server.url + "/d/s-{0..2}.tar?token=secret"))
        assert "secret" not in source.title
        before = source.stamp(1)
        assert before is not None
        assert "secret" not in before
        server.files["/d/s-1.tar"] = shard(70, 3)
        assert source.stamp(1) != before


def test_object_store_gives_the_samples(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/bucket/s-{number}.tar", shard(10 * number, 2))
    assert captions("memory://bucket/s-{0..1}.tar") == numbers(range(2), range(10, 12))


@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "whole files"])
@pytest.mark.parametrize("cuts", [1, 3])
def test_lost_connections_are_opened_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ranges: bool, cuts: int
) -> None:
    monkeypatch.setattr(opening, "BLOCK", 4096)
    monkeypatch.setattr(shards, "REMOTE_BUFFER", 2048)
    first = 1 if ranges else 0  # a part arrives whole or not at all
    server = Server({"/s.tar": shard(0, 20)}, ranges, range(first, first + cuts), 1000)
    with serving(server):
        assert captions(f"{server.url}/s.tar") == numbers(range(20))
    starts = [start for _, start in server.asked]
    assert len(starts) > cuts
    assert (max(starts) > 0) is ranges  # without parts the beginning is passed over
    assert caplog.text.count("trying again in 0 s") == cuts


def test_busy_server_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Server({"/s.tar": shard(0, 2)}, states=[503, 503, 429, 429])) as server:
        assert captions(f"{server.url}/s.tar") == numbers(range(2))
    assert [text for text in ("503", "429") if text in caplog.text] == ["503", "429"]


def test_connection_that_stays_lost_is_an_error_with_the_url() -> None:
    server = Server({"/s.tar": shard(0, 20)}, cuts=range(99), cut_after=0)
    words = r"http://127.*s\.tar can't be read after 3 more tries"
    with serving(server), pytest.raises(UserError, match=words):
        captions(f"{server.url}/s.tar?key=secret")
    with pytest.raises(UserError, match=r"s\.tar can't be read after 3 more tries") as refused:
        captions(f"{server.url}/s.tar?key=secret")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("state", "words"), [(404, "there is no file"), (403, "may not be read"), (418, "can't be read \\(418")]
)
def test_error_that_stays_is_told_at_once(state: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.time, "sleep", lambda _: pytest.fail("waited"))
    with serving(Server({}, states=[state] * 9)) as server, pytest.raises(UserError, match=words):
        captions(f"{server.url}/s.tar")


def test_shard_that_changes_while_it_is_read_is_refused() -> None:
    with serving(Server({"/s.tar": shard(0, 20)}, cuts=[0], cut_after=1000)) as server:
        file = opening.RemoteFile(f"{server.url}/s.tar")
        file._open()
        server.files["/s.tar"] = shard(800, 20)
        with pytest.raises(UserError, match="changed while it was read"):
            file.read(10)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pipe:curl -s https://example.org/a.tar", "commands are not run"),
        (["a.tar", " pipe:cat a.tar"], "commands are not run"),
        ("file:///etc/a.tar", "without file://"),
        ("simplecache::s3://bucket/a.tar", "chained URLs"),
        ([], "the list is empty"),
        (7, "expected a path, a URL, or a list"),
    ],
)
def test_path_that_is_not_read_is_refused(recipe_content: dict[str, Any], path: Any, words: str) -> None:
    recipe_content["data"] = {"source": "webdataset", "path": path}
    with pytest.raises(UserError, match=words) as refused:
        parse_recipe(recipe_content)
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere://bucket/a.tar", "no protocol 'nowhere'"),
        ("memory://bucket/none-{0..1}.tar", "there is no file memory://bucket/none-0.tar"),
        ("https://user:pass@example.org/folder/", r"https://example.org/folder/ is a folder"),
        ("https://example.org/{a,b.tar", "can't be expanded"),
        ("https://example.org/{0..99999999999}.tar", "names more than 1000000 shards"),
        ("https://example.org/{0..9999}/{0..9999}.tar", "names more than 1000000 shards"),
        (["memory://b/a.tar", "memory://b/a.tar"], "comes twice"),
        ("none/s-{0..1}.tar", "no shards at none"),
    ],
)
def test_shards_that_are_not_there_are_an_error(path: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        captions(path)


def test_protocol_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(opening, "file_system", missing)
    with pytest.raises(UserError, match="pip install s3fs"):
        captions("s3://bucket/a.tar")


@pytest.mark.parametrize("source", ["folder", "prompts"])
def test_other_sources_read_one_local_path(recipe_content: dict[str, Any], source: str) -> None:
    for path in ("https://example.org/a", ["a", "b"]):
        recipe_content["data"] = {"source": source, "path": path}
        with pytest.raises(UserError, match="one path of this machine"):
            parse_recipe(recipe_content)


@pytest.mark.parametrize("path", ["a/b.tar", "s3://b/s-{0..9}.tar", ["a.tar", "https://example.org/a.tar"]])
def test_recipe_keeps_its_path(recipe_content: dict[str, Any], path: Any) -> None:
    recipe_content["data"] = {"source": "webdataset", "path": path}
    recipe = parse_recipe(recipe_content)
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert yaml.safe_load(recipe.to_yaml())["data"]["path"] == path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "prompts"}, "stream reads the sources folder and webdataset"),
        ({"buckets": True}, "buckets needs cached data"),
        ({"limit": 5}, "limit needs cached data"),
    ],
)
def test_stream_refuses_what_it_cannot_do(recipe_content: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    recipe_content["data"] |= {"stream": True, **fields}
    with pytest.raises(UserError, match=words):
        parse_recipe(recipe_content)


def test_stream_refuses_recorded_trajectories(recipe_content: dict[str, Any]) -> None:
    recipe_content["data"]["stream"] = True
    recipe_content["trajectories"] = {"count": 4}
    with pytest.raises(UserError, match="recorded trajectories need cached data"):
        parse_recipe(recipe_content)
