"""The few endpoints of a model hub that huggingface_hub asks for, on localhost."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens that may write, and that may only read."""


class Hub:
    """What the hub holds: commits of each repository by revision, which is a branch or a hash."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.url = ""

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        repository = self.repositories[name]
        files = {**repository.get(branch, {}), **files}
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository[branch] = repository[oid] = files
        return oid

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def json(self, value: object, status: int = 200, **headers: str) -> None:
                self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

            def refuse(self, status: int, message: str, code: str = "") -> None:
                self.json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

            def token(self) -> str:
                return self.headers.get("Authorization", "").removeprefix("Bearer ")

            def do_GET(self) -> None:
                path = unquote(self.path.partition("?")[0])
                found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                name, *_ = (found or file).groups()
                if name not in hub.repositories:
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                if hub.private[name] and self.token() not in (WRITER, READER):
                    return self.refuse(401, "Repository not found", "RepoNotFound")
                revision = (file[2] if file else found[3]) or "main"
                files = hub.repositories[name].get(revision)
                if files is None:
                    return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                if file:
                    etag = f'"{hashlib.sha1(files[file[3]]).hexdigest()}"'
                    return self.answer(200, files[file[3]], ETag=etag, X_Repo_Commit=revision)
                oids = {each: hashlib.sha1(content).hexdigest() for each, content in files.items()}
                if found[2] == "tree":
                    kind = {"type": "file"}
                    return self.json([{**kind, "path": p, "oid": o, "size": len(files[p])} for p, o in oids.items()])
                oid = next(o for o, held in hub.repositories[name].items() if held == files and len(o) == 40)
                facts = {"id": name, "modelId": name, "sha": oid, "private": hub.private[name]}
                self.json({**facts, "siblings": [{"rfilename": p} for p in files]})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                token = self.token()
                if token not in (WRITER, READER):
                    return self.refuse(401, "Invalid credentials in Authorization header")
                if self.path == "/api/validate-yaml":
                    return self.json({"errors": [], "warnings": []})
                if token == READER:
                    return self.refuse(403, "You don't have the rights to do this")
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    if name in hub.repositories:
                        return self.json(
                            {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409
                        )
                    hub.repositories[name] = {}
                    hub.private[name] = asked.get("visibility") == "private" or asked.get("private", False)
                    hub.commit(name, "main", {".gitattributes": b""})
                    return self.json({"url": f"{hub.url}/{name}", "name": name})
                name, what, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", self.path).groups()
                if what == "branch":
                    hub.repositories[name].setdefault(unquote(revision), hub.repositories[name]["main"])
                    return self.json({})
                if what == "preupload":
                    mode = {"uploadMode": "regular", "shouldIgnore": False}
                    return self.json({"files": [{"path": f["path"], **mode} for f in json.loads(body)["files"]]})
                values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
                files = {value["path"]: base64.b64decode(value["content"]) for value in values}
                oid = hub.commit(name, unquote(revision), files)
                self.json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

        return Handler


@contextmanager
def serve_hub(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """Serves an empty hub that huggingface_hub takes for its own, with a cache of its own and nobody logged in."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), hub.handler()) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", f"{cache}/token")
        patch.delenv("HF_TOKEN", raising=False)
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
