"""A small Hugging Face hub on this machine, which huggingface_hub itself asks; it counts the bytes that it serves.

Files of weights are answered with a redirect to another address, as the hub does, and by ranges of bytes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<cdn>cdn/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    """Repositories by name, each with its commits, the newest last.

    Attributes:
      served: bytes of files by "owner/name" and file.
      asked: method and path of every request, in order.
      gated: names of repositories whose files are refused.
      before_file: is called with name and file before a file is served.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, Path]] = {}
        self.served: Counter[tuple[str, str]] = Counter()
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.before_file = lambda name, file: None
        self.endpoint = ""

    def push(self, name: str, directory: Path) -> str:
        """Make a directory the newest commit of a repository; return the commit."""
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = directory
        return commit

    def weights_served(self, name: str) -> int:
        """Bytes of safetensors files that a repository has served."""
        return sum(n for (where, file), n in self.served.items() if where == name and file.endswith(".safetensors"))

    def commit(self, name: str, revision: str | None) -> str | None:
        """The commit of a revision; "main" is the newest."""
        commits = self.commits.get(name, {})
        if commits and revision in (None, "main"):
            return list(commits)[-1]
        return revision if revision in commits else None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Let a hub answer requests of this process in the block; `hub.endpoint` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            for pattern, answer in ((API, self.about), (FILE, self.file)):
                if match := pattern.fullmatch(path):
                    answer(match)
                    return
            self.refuse(404, "EntryNotFound")

        def about(self, match: re.Match) -> None:
            commit = hub.commit(match["name"], match["revision"])
            if match["name"] not in hub.commits:
                self.refuse(401, "RepoNotFound")
            elif commit is None:
                self.refuse(404, "RevisionNotFound")
            elif match["what"] == "tree":
                self.send(200, json.dumps(tree(hub.commits[match["name"]][commit])).encode())
            else:
                self.send(200, json.dumps({"id": match["name"], "sha": commit, "siblings": []}).encode())

        def file(self, match: re.Match) -> None:
            name, file = match["name"], match["file"]
            commit = hub.commit(name, match["revision"])
            path = hub.commits.get(name, {}).get(commit, Path("/nowhere")) / file
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            hub.before_file(name, file)
            size, tag = path.stat().st_size, etag(path)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            if file.endswith(".safetensors") and not match["cdn"]:
                linked = {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{tag}"'}
                return self.send(302, b"", headers | linked | {"Location": f"{hub.endpoint}/cdn{self.path}"})
            start, stop, status = 0, size, 200
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop, status = int(wanted[1]), min(size, int(wanted[2] or size - 1) + 1), 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            content = path.read_bytes()[start:stop]
            if self.command == "GET":
                hub.served[name, file] += len(content)
            return self.send(status, content, headers)

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b'{"error": "refused"}', {"X-Error-Code": code, "X-Error-Message": f"refused: {code}"})

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def tree(directory: Path) -> list[dict]:
    """What the hub says of each file of a commit."""
    entries = []
    for path in sorted(directory.rglob("*")):
        entry = {"path": str(path.relative_to(directory)), "type": "directory", "oid": "0" * 40, "size": 0}
        if path.is_file():
            entry |= {"type": "file", "size": path.stat().st_size, "oid": etag(path)}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": etag(path), "size": entry["size"], "pointerSize": 134}
        entries.append(entry)
    return entries


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def asking(hub: Hub, cache: Path) -> Iterator[None]:
    """Point huggingface_hub to a hub and to a cache in the block."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
