"""A small hub over real HTTP: repositories in memory, the routes that huggingface_hub calls, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class LocalHub:
    """One repository, `me/them`, whose files, commits and faults a test reads and sets."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.exists = False
        self.commits = 0
        self.asked: list[str] = []
        """Files whose content was asked for."""
        self.refuse: tuple[int, dict[str, str]] | None = None
        """Status and headers of every answer."""
        self.cut_after: dict[str, int] = {}
        """File → bytes of it that come before the connection closes; later requests get no answer."""
        self.sizes: dict[str, int] = {}
        """File → size that is told in the place of its own."""
        self.held: tuple[str, threading.Event, threading.Event] | None = None
        """File, set when it is asked for, and awaited before it is sent."""
        self.busy: set[str] = set()
        """Files that get a 503."""
        self.on_upload = lambda: None
        """Called after each upload of a large file, before it is answered."""
        self.on_create = lambda: None
        """Called when the repository is asked to be made."""
        self.other_push = False
        """Whether someone else commits while files are uploaded."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status, body=b"", head=False, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_POST(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.refuse:
            return self._send(hub.refuse[0], {"error": "no"}, **hub.refuse[1])
        if path == "/api/repos/create":
            hub.exists = True
            hub.on_create()
            return self._send(200, {"url": f"{hub.url}/me/them", "name": "me/them"})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {n: "lfs" if n.endswith(".safetensors") else "regular" for n in names}
            oids = {n: _oid(hub.files[n], mode[n]) if n in hub.files else None for n in names}
            files = [{"path": n, "uploadMode": mode[n], "shouldIgnore": False, "oid": oids[n]} for n in names]
            hub.commits += hub.other_push
            return self._send(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if "/paths-info/" in path:
            there = [n for n in parse_qs(body.decode())["paths"] if n in hub.files]
            found = [(n, hub.sizes.get(n, len(hub.files[n]))) for n in there]
            return self._send(200, [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in found])
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            # Who names none takes whatever is there for it, as on the real one.
            if lines[0]["value"].get("parentCommit", hub.sha) != hub.sha:
                return self._send(412, {"error": "another commit"})
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            hub.commits += 1
            url = f"{hub.url}/me/them/commit/{hub.sha}"
            return self._send(200, {"success": True, "commitOid": hub.sha, "commitUrl": url})
        return self._send(200, {"errors": [], "warnings": []})

    def do_PUT(self):
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.on_upload()
        self._send(200)

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.refuse:
            return self._send(hub.refuse[0], {"error": "no"}, head, **hub.refuse[1])
        if not hub.exists:
            return self._send(404, {"error": "no"}, head, X_Error_Code="RepoNotFound")
        if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", "tried", hub.sha):
            return self._send(404, {"error": "no"}, head, X_Error_Code="RevisionNotFound")
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self._send(200, {"id": "me/them", "sha": hub.sha, "siblings": siblings}, head)
        match = re.fullmatch(r"/me/them/resolve/[^/]+/(.+)", path)
        if not match or match[1] not in hub.files:
            return self._send(404, {"error": "no"}, head, X_Error_Code="EntryNotFound")
        name, content = match[1], hub.files[match[1]]
        if name in hub.busy:
            return self._send(503, {"error": "busy"}, head)
        about = {"ETag": f'"{_oid(content, "lfs")}"', "X_Repo_Commit": hub.sha, "Accept_Ranges": "bytes"}
        if head:
            return self._send(200, content, head, **about)
        hub.asked.append(name)
        if hub.held and hub.held[0] == name:
            hub.held[1].set()
            hub.held[2].wait(10)
        if name not in hub.cut_after:
            return self._send(200, content, **about)
        self.close_connection = True
        if sent := content[: hub.cut_after[name]]:
            self.send_response(200)
            for key, value in about.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(sent)
            hub.cut_after[name] = 0
        return None


def _oid(content, mode):
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
