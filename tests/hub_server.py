"""A stand-in for the Hugging Face Hub on this machine, against which the real clients run.

It keeps repositories in memory and answers what `huggingface_hub` and `datasets` ask for: accounts, repositories,
commits, large files, pull requests, cards, file listings, downloads with ranges. Faults can be ordered for the next
requests. Nothing in the library knows of it: the clients are pointed here by HF_ENDPOINT (see conftest.py).
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Lock, Thread
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".parquet", ".tar", ".zip", ".png", ".jpg", ".jpeg", ".wav", ".arrow")
"""What the Hub keeps as large files, whatever their size."""
LARGEST_REGULAR = 10_000_000
LICENSES = (
    *(
        "apache-2.0",
        "mit",
        "openrail",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "isc",
    ),
    *("cc", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "ms-pl", "odbl", "osl-3.0", "postgresql", "unlicense"),
    *("wtfpl", "zlib", "ncsa", "pddl", "unknown", "other"),
)
TASKS = (
    *("unconditional-image-generation", "text-to-image", "image-to-image", "image-classification", "text-to-audio"),
    *("audio-to-audio", "text-to-speech", "audio-classification", "text-generation", "text-classification"),
    *("tabular-classification", "tabular-regression", "video-classification", "other"),
)
SDKS = ("gradio", "docker", "static")
CODES = {404: "RepoNotFound"}
"""The Hub's error codes where a fault is ordered by its status alone."""
Fault = int | str
_numbers = count(1)  # so that no two repositories of a session share a commit


class RefusalError(Exception):
    """An answer other than 200, with the Hub's error code."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class Request:
    """A request as it came in; `status` is 0 where the connection was closed without an answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the blob: of a large file, its pointer."""
        blob = self.content
        if self.large:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repo:
    """A repository: every commit with all its files, and the names of commits."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, ref: str, files: Mapping[str, File]) -> str:
        """Make the files the newest commit under a name."""
        sha = hashlib.sha1(f"{next(_numbers)} {self.id}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or hash names."""
        sha = self.refs.get(revision) or self.refs.get(f"refs/{revision}") or revision
        if sha not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class Hub:
    """The state of the stand-in for one test.

    Attributes:
        endpoint: its address.
        tokens: which user a token belongs to; a user writes to repositories under the own name alone.
        requests: all that came in, in order.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.tokens = {"hf_writer": "ada", "hf_reader": "bob"}
        self.requests: list[Request] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.lock = Lock()
        self._once: list[tuple[re.Pattern[str], list[Fault]]] = []
        self._always: list[tuple[re.Pattern[str], Fault]] = []

    def add_folder(
        self, repo_id: str, folder: Path, repo_type: str = "dataset", private: bool = False, gated: bool = False
    ) -> str:
        """Make a local folder the newest commit of a repository; returns the commit."""
        key = repo_type, repo_id
        repo = self.repos.setdefault(key, Repo(*key))
        repo.private, repo.gated = private, gated
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return repo.commit("main", {path.relative_to(folder).as_posix(): _file(path) for path in paths})

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without the .gitattributes that every repository begins with."""
        repo = self.repos[repo_type, repo_id]
        files = repo.commits[repo.resolve(revision)]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def fail(self, pattern: str, *faults: Fault) -> None:
        """The next requests whose "METHOD path" matches get these faults, one each.

        Args:
            pattern: regular expression.
            faults: an HTTP status; "drop": the connection is closed, and nothing is done; "half": what was asked for is
                done, and the connection is closed after half of the answer.
        """
        self._once.append((re.compile(pattern), list(faults)))

    def always(self, pattern: str, fault: Fault) -> None:
        """The same fault for every such request, until `clear`."""
        self._always.append((re.compile(pattern), fault))

    def clear(self) -> None:
        """No more faults."""
        self._once, self._always = [], []

    def fault(self, line: str) -> Fault | None:
        """What is to go wrong with the request."""
        for pattern, faults in self._once:
            if faults and pattern.search(line):
                return faults.pop(0)
        return next((fault for pattern, fault in self._always if pattern.search(line)), None)


@dataclass(frozen=True)
class Call:
    """A request on its way through the routes.

    Attributes:
        user: whose token came with it, None for none.
        kind: "model", "dataset" or "space", where the path names one.
    """

    hub: Hub
    request: Request
    parts: dict[str, str]
    user: str | None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.request.path).query)

    @property
    def json(self) -> Any:
        return json.loads(self.request.body)

    @property
    def kind(self) -> str:
        return (self.parts.get("kind") or "models").rstrip("/").removesuffix("s")

    def repo(self) -> Repo:
        """The repository named in the path, if the user may see it."""
        repo = self.hub.repos.get((self.kind, self.parts["repo"]))
        if repo is None or (repo.private and self.user != repo.owner):
            status, message = (
                (401, "Invalid username or password.") if self.user is None else (404, "Repository not found")
            )
            raise RefusalError(status, message, "RepoNotFound")
        return repo

    def writable(self) -> Repo:
        """The same, if the user may write to it."""
        repo = self.repo()
        if self.user != repo.owner:
            raise RefusalError(
                403 if self.user else 401, "You don't have the required permissions to perform this action"
            )
        return repo

    def files(self) -> tuple[str, dict[str, File]]:
        """The commit named in the path, and its files."""
        repo = self.repo()
        sha = repo.resolve(self.parts.get("revision") or "main")
        return sha, repo.commits[sha]


class Answer(NamedTuple):
    """What goes back."""

    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    status: int = 200


def whoami(call: Call) -> Any:
    if call.user is None:
        raise RefusalError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
    return {
        "type": "user",
        "id": "0",
        "name": call.user,
        "fullname": call.user,
        "orgs": [],
        "auth": {"accessToken": token},
    }


def create_repo(call: Call) -> Any:
    wanted = call.json
    owner, kind = wanted.get("organization") or call.user, wanted.get("type") or "model"
    if call.user is None or call.user != owner:
        raise RefusalError(
            403 if call.user else 401, f"You don't have the rights to create a {kind} under the namespace {owner}"
        )
    key = kind, f"{owner}/{wanted['name']}"
    url = f"{call.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{key[1]}"
    if key in call.hub.repos:
        raise RefusalError(409, f"You already created this {kind} repo", url=url)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    repo = call.hub.repos[key] = Repo(*key, private=private, sdk=wanted.get("sdk"))
    repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
    return {"url": url, "name": key[1]}


def repo_info(call: Call) -> Any:
    sha, files = call.files()
    repo = call.repo()
    return {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.owner,
        "sha": sha,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "sdk": repo.sdk,
        "lastModified": "2024-01-01T00:00:00.000Z",
        "createdAt": "2024-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": path, **_blob(file)} for path, file in sorted(files.items())],
    }


def refs(call: Call) -> Any:
    known = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in call.repo().refs.items()]
    pulls = [entry for entry in known if entry["name"].startswith("refs/pr/")]
    branches = [{**entry, "ref": f"refs/heads/{entry['name']}"} for entry in known if entry not in pulls]
    return {"branches": branches, "tags": [], "converts": [], "pullRequests": pulls}


def tree(call: Call) -> Any:
    _, files = call.files()
    under, recursive = call.parts.get("path") or "", call.query.get("recursive", ["false"])[0].lower() == "true"
    entries = _entries(files)
    inside = {path: entry for path, entry in entries.items() if path.startswith(f"{under}/" if under else "")}
    if under and not inside:
        raise RefusalError(404, f"{under} does not exist", "EntryNotFound")
    depth = under.count("/") + 1 if under else 0
    return [entry for path, entry in inside.items() if recursive or path.count("/") == depth]


def paths_info(call: Call) -> Any:
    _, files = call.files()
    body = call.request.body
    wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
    entries = _entries(files)
    return [entries[path.strip("/")] for path in wanted if path.strip("/") in entries]


def download(call: Call) -> Answer:
    sha, files = call.files()
    if call.repo().gated and call.user != call.repo().owner:
        raise RefusalError(403 if call.user else 401, "Access to this repository is restricted", "GatedRepo")
    file = files.get(call.parts["path"])
    if file is None:
        raise RefusalError(404, "Entry not found", "EntryNotFound", commit=sha)
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if file.large:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.request.headers.get("range", ""))
    if wanted is None:
        return Answer(file.content, headers)
    size = len(file.content)
    first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
    last = min(int(wanted[2]) if wanted[1] and wanted[2] else size - 1, size - 1)
    if first > last:
        raise RefusalError(416, "Range not satisfiable")
    return Answer(file.content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, 206)


def validate_card(call: Call) -> Any:
    errors = card_errors(call.json["content"], call.json.get("repoType") or "model")
    if errors:
        raise RefusalError(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
    return {"errors": [], "warnings": []}


def card_errors(content: str, kind: str) -> list[str]:
    """What is wrong with the metadata of a card."""
    from huggingface_hub import ModelCardData  # it reads the address of the Hub when it is imported

    found = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", content, re.DOTALL)
    if found is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(found[1])
        if kind == "model":
            ModelCardData(**data, ignore_metadata_errors=False)
    except Exception as error:
        return [f"the metadata cannot be read: {error}"]
    checks = {
        '"license" must be one of the known licences': data.get("license") in (None, *LICENSES),
        '"pipeline_tag" must be one of the known tasks': data.get("pipeline_tag") in (None, *TASKS),
        '"tags" must be a list of text': all(isinstance(tag, str) for tag in data.get("tags", [])),
        '"datasets" must be names on the Hub': all(
            re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) for name in data.get("datasets", [])
        ),
        '"model-index" must hold named models with results': all(
            model.get("name") and all(map(_is_result, model["results"])) for model in data.get("model-index", [])
        ),
        '"sdk" must be one of gradio, docker, static': kind != "space" or data.get("sdk") in SDKS,
    }
    return [message for message, right in checks.items() if not right]


def _is_result(result: Mapping[str, Any]) -> bool:
    metrics = result["metrics"]
    named = bool(metrics) and "type" in result["task"] and {"name", "type"} <= result["dataset"].keys()
    return named and all(metric["type"] and isinstance(metric["value"], int | float) for metric in metrics)


def preupload(call: Call) -> Any:
    proposed = bool(call.query.get("create_pr"))
    repo = call.repo() if proposed and call.user else call.writable()
    here = repo.commits[repo.resolve(call.parts["revision"])]
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                **({"oid": here[file["path"]].etag} if file["path"] in here else {}),
            }
            for file in call.json["files"]
        ]
    }


def lfs_batch(call: Call) -> Any:
    if call.user is None:
        raise RefusalError(401, "Invalid username or password.")
    call.repo()
    objects = []
    for wanted in call.json["objects"]:
        verify = f"{call.hub.endpoint}/lfs-verify/{wanted['oid']}"
        put = f"{call.hub.endpoint}/lfs-storage/{wanted['oid']}"
        actions = {"upload": {"href": put, "header": {}}, "verify": {"href": verify, "header": {}}}
        known = wanted["oid"] in call.hub.large
        objects.append({**wanted, "authenticated": True, **({} if known else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


def lfs_put(call: Call) -> Any:
    if hashlib.sha256(call.request.body).hexdigest() != call.parts["oid"]:
        raise RefusalError(400, "the content is not what was announced")
    call.hub.large[call.parts["oid"]] = call.request.body
    return {}


def lfs_verify(call: Call) -> Any:
    wanted = call.json
    if len(call.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
        raise RefusalError(404, "the file was not uploaded")
    return {}


def commit(call: Call) -> Any:
    proposed = bool(call.query.get("create_pr"))
    repo = call.repo() if proposed and call.user else call.writable()
    branch = call.parts["revision"]
    parent = repo.resolve(branch)
    header, *operations = [json.loads(line) for line in call.request.body.splitlines()]
    if header["value"].get("parentCommit", parent) != parent:
        raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[parent])
    for operation in operations:
        _OPERATIONS[operation["key"]](call.hub, files, operation["value"])
    pull = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
    sha = repo.commit(f"refs/pr/{pull}" if proposed else branch, files)
    where = f"{call.hub.endpoint}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"
    proposal = {"pullRequestUrl": f"{where}/discussions/{pull}"} if proposed else {}
    return {"success": True, "commitOid": sha, "commitUrl": f"{where}/commit/{sha}", **proposal}


def create_branch(call: Call) -> Any:
    repo = call.writable()
    if call.parts["revision"] in repo.refs:
        raise RefusalError(409, "the branch exists already")
    repo.refs[call.parts["revision"]] = repo.resolve(call.json.get("startingPoint") or "main")
    return {}


def create_tag(call: Call) -> Any:
    repo = call.writable()
    repo.refs[call.json["tag"]] = repo.resolve(call.parts["revision"])
    return {}


def delete_repo(call: Call) -> Any:
    wanted = call.json
    key = wanted.get("type") or "model", f"{wanted.get('organization') or call.user}/{wanted['name']}"
    if key not in call.hub.repos or call.user != key[1].split("/")[0]:
        raise RefusalError(404, "Repository not found", "RepoNotFound")
    del call.hub.repos[key]
    return {}


API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
REVISION, PATH = r"/(?P<revision>[^/]+)", r"(?:/(?P<path>.+))?"
ROUTES: list[tuple[str, Callable[[Call], Any]]] = [
    (r"GET /api/whoami-v2", whoami),
    (r"POST /api/repos/create", create_repo),
    (r"DELETE /api/repos/delete", delete_repo),
    (r"POST /api/validate-yaml", validate_card),
    (rf"GET {API}/refs", refs),
    (rf"GET {API}/tree{REVISION}{PATH}", tree),
    (rf"POST {API}/paths-info{REVISION}", paths_info),
    (rf"POST {API}/preupload{REVISION}", preupload),
    (rf"POST {API}/commit{REVISION}", commit),
    (rf"POST {API}/branch{REVISION}", create_branch),
    (rf"POST {API}/tag{REVISION}", create_tag),
    (rf"GET {API}(?:/revision{REVISION})?", repo_info),
    (r"POST /(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    (r"PUT /lfs-storage/(?P<oid>\w+)", lfs_put),
    (r"POST /lfs-verify/(?P<oid>\w+)", lfs_verify),
    (rf"(?:GET|HEAD) /(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)/resolve{REVISION}/(?P<path>.+)", download),
]


def _add_regular(hub: Hub, files: dict[str, File], value: Mapping[str, Any]) -> None:
    files[value["path"]] = File(base64.b64decode(value["content"]), False)


def _add_large(hub: Hub, files: dict[str, File], value: Mapping[str, Any]) -> None:
    if value["oid"] not in hub.large:
        raise RefusalError(400, f"the large file {value['path']} was not uploaded")
    files[value["path"]] = File(hub.large[value["oid"]], True)


def _delete_file(hub: Hub, files: dict[str, File], value: Mapping[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")


def _delete_folder(hub: Hub, files: dict[str, File], value: Mapping[str, Any]) -> None:
    for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
        del files[path]


_OPERATIONS: dict[str, Callable[[Hub, dict[str, File], Mapping[str, Any]], None]] = {
    "file": _add_regular,
    "lfsFile": _add_large,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}


def _is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LARGEST_REGULAR


def _file(path: Path) -> File:
    content = path.read_bytes()
    return File(content, _is_large(path.name, len(content)))


def _blob(file: File) -> dict[str, Any]:
    large = {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": 130}}
    return {"size": len(file.content), "oid": file.oid, "blobId": file.oid, **(large if file.large else {})}


def _entries(files: Mapping[str, File]) -> dict[str, dict[str, Any]]:
    """Files and the folders that they are in, as a listing shows them."""
    commit = {"id": "0" * 40, "title": "", "date": "2024-01-01T00:00:00.000Z"}
    folders = {parent.as_posix() for path in files for parent in Path(path).parents if parent.name}
    found = {path: {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders}
    found |= {path: {"type": "file", "path": path, **_blob(file)} for path, file in files.items()}
    return {path: {**found[path], "lastCommit": commit} for path in sorted(found)}


class Server(ThreadingHTTPServer):
    """Serves `hub` on one port; while there is none, every answer is 404."""

    daemon_threads = True
    hub: Hub | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is nothing to tell of."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client to acknowledge its head
    server: Server

    def answer(self) -> None:
        """Find the route, do what it says, and answer, or fail as ordered."""
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, b"".join(self._body()))
        line = f"{request.method} {request.path}"
        fault = hub.fault(line) if hub else None
        if hub:
            hub.requests.append(request)
        if fault == "drop":
            self._hang_up()
            return
        ordered = RefusalError(fault, "ordered by the test", CODES.get(fault, "")) if isinstance(fault, int) else None
        answer = _refuse(ordered) if ordered else _dispatch(hub, request)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if fault == "half" else answer.body)
        if fault == "half":
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def _dispatch(hub: Hub | None, request: Request) -> Answer:
    line = f"{request.method} {urlsplit(request.path).path}"
    try:
        if hub is None:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        for pattern, act in ROUTES:
            if found := re.fullmatch(pattern, line):
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value}
                with hub.lock:
                    done = act(Call(hub, request, parts, _user(hub, request)))
                return done if isinstance(done, Answer) else Answer(json.dumps(done).encode())
        raise RefusalError(404, f"no such place: {line}", "RepoNotFound")
    except RefusalError as refusal:
        return _refuse(refusal)


def _user(hub: Hub, request: Request) -> str | None:
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and token not in hub.tokens:
        raise RefusalError(401, "Invalid credentials in Authorization header")
    return hub.tokens.get(token)


def _refuse(refusal: RefusalError) -> Answer:
    more = dict(refusal.more)
    headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
    if commit_ := more.pop("commit", None):
        headers["X-Repo-Commit"] = commit_
    return Answer(json.dumps({"error": refusal.message, **more}).encode(), headers, refusal.status)
