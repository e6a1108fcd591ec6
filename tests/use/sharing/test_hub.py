"""To the hub and back, against a stand-in that speaks the part of its language that is needed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

import headwise as hw
from headwise import use
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet


class StandIn(ThreadingHTTPServer):
    """Repositories in memory: a list of commits each, every one a mapping from path to content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.readers: set[str] = set()
        """Tokens that may read and not write."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        self.repos.setdefault(repo, []).append(files)
        return self.sha(repo, len(self.repos[repo]) - 1)

    def sha(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, form: Any) -> None:
        self.answer(200, json.dumps(form).encode(), Content_Type="application/json")

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision and its files; answers what the hub answers where there are none."""
        commits = self.server.repos.get(repo)
        if commits is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        shas = [self.server.sha(repo, number) for number in range(len(commits))]
        if revision == "main" or revision in shas:
            number = len(commits) - 1 if revision == "main" else shas.index(revision)
            return shas[number], commits[number]
        self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        return None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if at := self.files(found[1], found[2] or "main"):
                sha, files = at
                self.say({"id": found[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if at := self.files(found[1], found[2]):
                listed = {name: hashlib.sha1(content).hexdigest() for name, content in at[1].items()}
                self.say([{"type": "file", "path": n, "size": len(at[1][n]), "oid": oid} for n, oid in listed.items()])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if at := self.files(found[1], found[2]):
                content = at[1].get(found[3])
                if content is None:
                    self.answer(404, X_Error_Code="EntryNotFound")
                    return
                self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=at[0])
        else:
            self.answer(500, X_Error_Message=f"the stand-in does not know {path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"POST {path}")
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        if self.headers.get("Authorization", "").removeprefix("Bearer ") in self.server.readers:
            self.answer(403, X_Error_Message="You have read access but not the required permissions")
        elif path == "/api/repos/create":
            form = json.loads(body)
            repo = f"{form['organization']}/{form['name']}"
            if repo in self.server.repos:
                self.answer(409, json.dumps({"url": f"{self.server.address}/{repo}"}).encode())
                return
            self.server.private[repo] = form.get("visibility") == "private" or form.get("private") is True
            self.server.commit(repo, {".gitattributes": b""})
            self.say({"url": f"{self.server.address}/{repo}"})
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self.files(found[1], found[2]):
                names = [each["path"] for each in json.loads(body)["files"]]
                self.say({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            if at := self.files(found[1], found[2]):
                files = dict(at[1])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del files[line["value"]["path"]]
                sha = self.server.commit(found[1], files)
                self.say({"commitUrl": f"{self.server.address}/{found[1]}/commit/{sha}", "commitOid": sha})
        else:
            self.answer(500, X_Error_Message=f"the stand-in does not know {path}")

    def chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    settle(monkeypatch, tmp_path, server.address)
    yield server
    server.shutdown()
    server.server_close()


def settle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    """What HF_ENDPOINT and HF_HOME would do in a new process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", address + template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@cache
def llama() -> hw.AttachedModel:
    return hw.load("zoo:tiny-llama")


def offset() -> use.Intervention:
    return use.HeadOffset({"L1H2": torch.arange(llama().site("L1").head_dim) / 7}, 2.0)


def test_there_and_back(hub: StandIn, tmp_path: Path) -> None:
    folder = use.save(offset(), tmp_path / "it", model=llama(), licence="mit")
    address = use.push_to_hub(folder, "me/louder", private=True)
    assert address == f"{hub.address}/me/louder/commit/{hub.sha('me/louder', 1)}"
    assert hub.private == {"me/louder": True}
    there = hub.repos["me/louder"][-1]
    assert {name: there[name] for name in there if name != ".gitattributes"} == {
        each.name: each.read_bytes() for each in folder.iterdir()
    }
    found = use.from_pretrained("me/louder", model=llama())
    assert found.strength == 2.0
    assert torch.equal(found.offset["L1H2"], offset().offset["L1H2"])


def test_an_older_commit_and_what_is_not_there_any_more(hub: StandIn) -> None:
    use.push_to_hub(offset(), "me/steps", model=llama())
    use.push_to_hub(HeadSet.parse("L0H1"), "me/steps", model=llama(), licence="mit")
    assert hub.repos["me/steps"][-1].keys() == {".gitattributes", "README.md", "headwise.json"}, "no tensors are left"
    assert use.from_pretrained("me/steps") == HeadSet.parse("L0H1")
    older = use.from_pretrained("me/steps", revision=hub.sha("me/steps", 1))
    assert older.id == "head-offset"


def test_the_cache_serves_without_a_network(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama())
    assert use.from_pretrained("me/heads") == HeadSet.parse("L0H1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert use.from_pretrained("me/heads", model=llama()) == HeadSet.parse("L0H1")


def test_only_its_own_files_are_fetched(hub: StandIn) -> None:
    use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama())
    hub.commit("me/heads", hub.repos["me/heads"][-1] | {"large.bin": b"0" * 100, "sub/code.py": b""})
    assert use.from_pretrained("me/heads") == HeadSet.parse("L0H1")
    fetched = {each.rsplit("/", 1)[1] for each in hub.asked if "/resolve/" in each}
    assert fetched == {"headwise.json", "README.md"}


def test_a_repository_of_something_else_is_left_alone(hub: StandIn) -> None:
    hub.commit("me/model", {".gitattributes": b"", "model.safetensors": b"weights"})
    with pytest.raises(Refusal, match=r"holds model.safetensors and no headwise.json"):
        use.push_to_hub(HeadSet.parse("L0H1"), "me/model", model=llama())
    assert len(hub.repos["me/model"]) == 1


def test_another_model_is_refused_from_the_hub_as_well(hub: StandIn) -> None:
    use.push_to_hub(offset(), "me/louder", model=llama())
    with pytest.raises(Refusal, match="does not fit zoo:tiny-gpt2"):
        use.from_pretrained("me/louder", model=hw.load("zoo:tiny-gpt2"))


def test_typing_mistakes_are_one_line(hub: StandIn, tmp_path: Path) -> None:
    use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama())
    asks: list[tuple[type[Exception], str, Any]] = [
        (InputError, "not a repository on the hub", lambda: use.from_pretrained("me/nothing")),
        (InputError, "no revision 'v9' on the hub", lambda: use.from_pretrained("me/heads", revision="v9")),
        (InputError, "named owner/name", lambda: use.from_pretrained("heads")),
        (InputError, "named owner/name", lambda: use.from_pretrained("./me/heads")),
        (InputError, "revision 'v1' is for the hub", lambda: use.from_pretrained(tmp_path, revision="v1")),
        (InputError, "takes model=", lambda: use.push_to_hub(HeadSet.parse("L0H1"), "me/heads")),
        (InputError, "is not a folder", lambda: use.push_to_hub(tmp_path / "no", "me/heads")),
        (InputError, "a folder has its own", lambda: use.push_to_hub(tmp_path, "me/heads", licence="mit")),
        (InputError, "repository", lambda: use.push_to_hub(HeadSet.parse("L0H1"), "me/he ads", model=llama())),
        (
            InputError,
            "no revision 'v9'",
            lambda: use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama(), revision="v9"),
        ),
    ]
    before = len(hub.repos["me/heads"])
    for kind, message, ask in asks:
        with pytest.raises(kind, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
    assert len(hub.repos["me/heads"]) == before


def test_a_token_that_may_not_write_is_one_line(hub: StandIn) -> None:
    hub.readers.add("reader")
    with pytest.raises(Refusal, match=r"status 403.*hf auth login"):
        use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama(), token="reader")
    assert not hub.repos


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settle(monkeypatch, tmp_path, "http://127.0.0.1:9")
    for ask in (
        lambda: use.from_pretrained("me/heads"),
        lambda: use.push_to_hub(HeadSet.parse("L0H1"), "me/heads", model=llama()),
    ):
        with pytest.raises(Refusal, match="the hub cannot be reached") as error:
            ask()
        assert "\n" not in str(error.value)
