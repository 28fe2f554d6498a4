"""A small Hub on 127.0.0.1: repositories with commits, branches, LFS uploads and tokens, for the client of the Hub.

with LoopbackHub() as hub:      # hub.url, hub.repos["user/name"], hub.requests
    hub.faults["PUT /lfs"] = 400            # requests that fail, and how
    hub.cut.add("model.safetensors")        # downloads that break off half-way
    hub.moved["user/old"] = "user/new"      # renamed repositories
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


class Repo:
    """Commits are dicts of files by their hash; branches name commits."""

    def __init__(self, private=False):
        self.private, self.gated = private, False
        self.commits, self.branches = {}, {}
        self.branches["main"] = self.add({})

    def add(self, files):
        listed = json.dumps([sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items()), len(self.commits)])
        commit = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[commit] = files
        return commit

    def put(self, files, branch="main"):
        """Commit some files, as somebody else would."""
        self.branches[branch] = self.add({**self.files(branch), **files})

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]

    def find(self, revision):
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class LoopbackHub:
    def __init__(self):
        self.repos, self.blobs, self.requests, self.faults = {}, {}, [], {}
        self.cut, self.moved = set(), {}

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code="", message=""):
        self.reply(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def body(self):
        """The body of the request, also one sent in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def serve(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.requests.append((self.command, path))
        for pattern, status in self.hub.faults.items():
            if re.search(pattern, f"{self.command} {path}"):
                return self.fail(status, message="out of order")
        for old, new in self.hub.moved.items():
            if re.search(rf"/{old}(/|$)", path):
                return self.reply(307, Location=self.path.replace(old, new, 1))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return self.fail(401, message="Invalid credentials in Authorization header")
        if self.command == "POST" and token != WRITER and path != "/api/validate-yaml":  # PUT goes to signed addresses
            return self.fail(403 if token else 401, message="this token may not write")
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, body, **match.groupdict())
        return self.fail(404, message=f"no such address: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def repo(self, name, revision=None):
        """The repository and commit, or None after an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and "Authorization" not in self.headers):
            return self.fail(404, "RepoNotFound")
        if repo.gated and self.command != "POST":
            return self.fail(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = repo.find(revision or "main")
        return (repo, commit) if commit else self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repos:
            return self.reply(409, {"url": f"{self.hub.url}/{name}", "id": name})
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private", False))
        return self.reply(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def info(self, body, name, revision=None):
        if found := self.repo(name, revision):
            repo, commit = found
            files = [{"rfilename": file} for file in sorted(repo.files(commit))]
            self.reply(200, {"id": name, "sha": commit, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, body, name, revision):
        if found := self.repo(name, revision):
            repo, commit = found
            shown = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in repo.files(commit).items()
            ]
            self.reply(200, shown)

    def preupload(self, body, name, revision):
        if self.repo(name, revision):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            shown = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            self.reply(200, {"files": shown})

    def batch(self, body, name):
        shown = []
        for blob in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{blob['oid']}", "header": {}}}
            shown.append({**blob, **({} if blob["oid"] in self.hub.blobs else {"actions": action})})
        self.reply(200, {"transfer": "basic", "objects": shown})

    def store(self, body, oid):
        self.hub.blobs[oid] = body
        self.reply(200)

    def branch(self, body, name, revision):
        if found := self.repo(name):
            repo, commit = found
            repo.branches.setdefault(revision, commit)
            self.reply(200, {})

    def commit(self, body, name, revision):
        if found := self.repo(name, revision):
            repo, commit = found
            files = dict(repo.files(commit))
            for line in body.splitlines():
                step = json.loads(line)
                key, value = step["key"], step["value"]
                if key == "header" and value.get("parentCommit", commit) != commit:
                    return self.fail(412, message="the branch has moved")
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            repo.branches[revision] = oid = repo.add(files)
            self.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})
        return None

    def resolve(self, body, name, revision, path):
        if found := self.repo(name, revision):
            repo, commit = found
            data = repo.files(commit).get(path)
            if data is None:
                return self.fail(404, "EntryNotFound")
            facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit}
            if self.command == "GET" and path in self.hub.cut:
                self.close_connection = True
                facts["Content_Length"], data = str(len(data)), data[: len(data) // 2]
            self.reply(200, data, **facts)
        return None

    def validate(self, body):
        self.reply(200, {"errors": [], "warnings": []})


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{NAME}", _Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", _Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}", _Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", _Handler.branch),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.store),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]
