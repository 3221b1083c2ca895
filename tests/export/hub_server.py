"""A hub of this machine: what huggingface_hub asks the real one for when it makes, writes and reads models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    address: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path -> content."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    private: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)
    """Names that are not for this user."""
    begun: dict[str, bytes] = field(default_factory=dict)
    """What a new model holds."""
    asked: list[str] = field(default_factory=list)

    def commit(self, name: str) -> str:
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(self.models[name].items()):
            digest.update(path.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and JSON or bytes."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.models:
                return 409, {}, {"error": "exists", "url": f"{self.address}/{name}"}
            if name in self.locked:
                return 403, {}, {"error": "Forbidden"}
            self.models[name] = dict(self.begun)
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.add(name)
            return 200, {}, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if method == "PUT" and path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        found = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w-]+)(?:\.git)?/([\w-]+)/(.+)", path)
        if found is None or found[1] not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        name, what, rest = found.groups()
        answers = {"preupload": self._preupload, "info": self._info, "commit": self._commit}
        answers |= {"revision": self._revision, "tree": self._tree, "resolve": self._resolve}
        if what not in answers:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": f"nothing is at {path}"}
        return answers[what](name, rest, body)

    def _preupload(self, name: str, _: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        files = json.loads(body)["files"]
        modes = [{"path": of["path"], "uploadMode": _mode(of["path"]), "shouldIgnore": False} for of in files]
        return 200, {}, {"files": modes}

    def _info(self, name: str, _: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        wanted = json.loads(body)["objects"]
        actions = [{**of, "actions": {"upload": {"href": f"{self.address}/lfs/{of['oid']}"}}} for of in wanted]
        return 200, {}, {"transfer": "basic", "objects": actions}

    def _commit(self, name: str, _: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.models[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                self.models[name][item["value"]["path"]] = self.stored[item["value"]["oid"]]
        commit = self.commit(name)
        url = f"{self.address}/{name}/commit/{commit}"
        return 200, {}, {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None}

    def _revision(self, name: str, revision: str, _: bytes) -> tuple[int, dict[str, str], Any]:
        if revision not in ("main", self.commit(name)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev"}
        files = [{"rfilename": path} for path in self.models[name]]
        return 200, {}, {"id": name, "modelId": name, "sha": self.commit(name), "siblings": files, "tags": []}

    def _tree(self, name: str, revision: str, _: bytes) -> tuple[int, dict[str, str], Any]:
        """As the newer clients list files."""
        if revision not in ("main", self.commit(name)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev"}
        found = []
        for path, content in self.models[name].items():
            oid, size = hashlib.sha256(content).hexdigest(), len(content)
            large = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if _mode(path) == "lfs" else {}
            found.append({"type": "file", "path": path, "size": size, "oid": oid, **large})
        return 200, {}, found

    def _resolve(self, name: str, rest: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        revision, _, path = rest.partition("/")
        if revision not in ("main", self.commit(name)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev"}
        content = self.models[name].get(path)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(name)}, content


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {path}")
            status, headers, answer = hub.answer(self.command, path, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "Content-Type": kind, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        hub.address = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield hub
        http.shutdown()
