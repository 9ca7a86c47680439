"""A Hub on the loopback: what the real `huggingface_hub` client asks for, kept in memory, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackloopbackloopback"
OWNER = "tester"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Blob:
    """Content of a file, and whether it is kept as a large one."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        described = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.large:
            described["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return described


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all of its files."""

    private: bool
    sdk: str | None = None
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)

    @property
    def head(self) -> tuple[str, dict[str, Blob]]:
        return self.commits[-1]

    def add(self, files: dict[str, Blob]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted((p, b.oid) for p, b in files.items())}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha


@dataclass
class Fault:
    """
    What goes wrong, with which requests, and how often.

    Args:
        match (`str`):
            Regular expression for `METHOD /path`.
        times (`int`):
            How many of the matching requests.
        status (`int`, *optional*):
            Answer with this code instead.
        headers (`dict`, *optional*):
            Headers of that answer.
        cut (`str`, *optional*):
            `"upload"`: hang up while the body arrives; `"answer"`: do the work, then hang up without a word.
        delay (`float`, *optional*):
            Seconds to wait before anything else.
        skip (`int`, *optional*):
            How many matching requests to let through first.
    """

    match: str
    times: int = 1
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: str | None = None
    delay: float = 0.0
    skip: int = 0


class LoopbackHub:
    """
    The server; a context manager.

    Attributes:
        repos (`dict`): repositories by kind and id.
        objects (`dict[str, bytes]`): large files that have arrived, by SHA-256.
        faults (`list[Fault]`): what is to go wrong.
        requests (`list[str]`): `METHOD /path` of every request.
        received (`Counter`): bytes of large files taken in, by SHA-256.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: Counter = Counter()
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        """Files of a repository at its head."""
        return {path: blob.content for path, blob in self.repos[kind, repo_id].head[1].items()}

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _HungUp(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def _serve(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        request = f"{self.command} {path}"
        fault = self.hub.fault_for(request)
        self.hub.requests.append(request)
        try:
            if fault is not None:
                time.sleep(fault.delay)
            body = self._body(fault is not None and fault.cut == "upload")
            if fault is not None and fault.status is not None:
                self._answer(fault.status, {"error": "injected"}, fault.headers)
                return
            open_to_all = path.startswith("/objects/") or path == "/api/validate-yaml"
            if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid credentials in Authorization header"})
                return
            with self.hub.lock:
                status, content, headers = self._route(path, body)
            if fault is not None and fault.cut == "answer":
                raise _HungUp
            self._answer(status, content, headers)
        except _HungUp:
            self.close_connection = True
            self.connection.shutdown(2)
        except OSError:
            # The client hung up
            self.close_connection = True

    def _body(self, cut: bool) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if cut:
            self.rfile.read(length // 2)
            raise _HungUp
        return self.rfile.read(length)

    def _answer(self, status: int, content, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- Requests, each answered by status, content, headers -----------------------------------------------------

    def _route(self, path: str, body: bytes):
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, **match.groupdict())
        return 404, {"error": f"no route for {self.command} {path}"}, {}

    def _repo(self, kind: str, repo: str) -> Repo | None:
        return self.hub.repos.get((KINDS.get(kind, kind), repo))

    @staticmethod
    def _missing():
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

    def whoami(self, body):
        return 200, {"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self, body):
        wanted = json.loads(body)
        kind, repo_id = wanted.get("type") or "model", f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "id": repo_id, "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return 409, answer | {"error": "You already created this repo"}, {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.hub.repos[kind, repo_id] = Repo(private, wanted.get("sdk"))
        repo.add({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return 200, answer, {}

    def validate(self, body):
        wanted = json.loads(body)
        parts = wanted["content"].split("---\n", 2)
        try:
            data = yaml.safe_load(parts[1]) if len(parts) == 3 else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        if not isinstance(data, dict):
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}, {}
        errors = []
        for result in [r for model in data.get("model-index") or [] for r in model.get("results", [])]:
            errors += [f'"{key}" is required' for key in ("task", "dataset", "metrics") if key not in result]
            if not {"type", "name"} <= set(result.get("dataset", {})):
                errors.append('"dataset" needs "type" and "name"')
        if wanted["repoType"] == "space" and data.get("sdk") not in ("gradio", "docker", "static"):
            errors.append('"sdk" must be one of gradio, docker, static')
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}, {}

    def info(self, body, kind, repo, revision=None):
        found = self._repo(kind, repo)
        if found is None:
            return self._missing()
        sha, files = found.head
        siblings = [{"rfilename": path} for path in sorted(files)]
        described = {"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []}
        if kind == "spaces":
            described |= {"sdk": found.sdk}
        return 200, described, {}

    def tree(self, body, kind, repo, revision):
        found = self._repo(kind, repo)
        if found is None:
            return self._missing()
        return 200, [blob.entry(path) for path, blob in sorted(found.head[1].items())], {}

    def paths_info(self, body, kind, repo, revision):
        found = self._repo(kind, repo)
        if found is None:
            return self._missing()
        try:
            wanted = json.loads(body)["paths"]
        except json.JSONDecodeError:
            wanted = parse_qs(body.decode())["paths"]
        files = found.head[1]
        return 200, [files[path].entry(path) for path in wanted if path in files], {}

    def preupload(self, body, kind, repo, revision):
        found = self._repo(kind, repo)
        if found is None:
            return self._missing()
        files = found.head[1]
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".png")) or file["size"] > 10_000_000
            held = files.get(file["path"])
            oid = None if held is None else held.sha256 if held.large else held.oid
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        return 200, {"files": answer}, {}

    def batch(self, body, repo):
        objects = []
        for wanted in json.loads(body)["objects"]:
            described = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                described["actions"] = {"upload": {"href": f"{self.hub.endpoint}/objects/{wanted['oid']}"}}
            objects.append(described)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "checksum differs"}, {}
        self.hub.received[oid] += len(body)
        self.hub.objects[oid] = body
        return 200, b"", {}

    def commit(self, body, kind, repo, revision):
        found = self._repo(kind, repo)
        if found is None:
            return self._missing()
        sha, files = found.head
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, sha):
                return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 400, {"error": f"large file {value['path']} has not arrived"}, {}
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = found.add(files)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}", "commitOid": made, "success": True}, {}

    def branch(self, body, kind, repo, revision):
        return 200, {}, {}

    def resolve(self, body, repo, revision, file, kind="models"):
        found = self._repo((kind or "models").rstrip("/"), repo)
        if found is None:
            return self._missing()
        sha, files = found.head
        if file not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        blob = files[file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"'}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return 200, blob.content, headers


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET {_API}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"POST {_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (rf"POST {_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST {_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"POST {_API}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (r"POST /(?:datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /objects/(?P<oid>\w+)", _Handler.upload),
    (
        r"(?:GET|HEAD) /(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
)
