"""The page of a sheet, on this machine's own address alone.

A browser carries requests of any site to 127.0.0.1. So a request must name this server as its host (a name
that was bound anew to 127.0.0.1 does not), one that writes must come from this page, and the address holds a
token that no other site, and no other user of the machine, knows.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import TypedDict
from urllib.parse import parse_qs, urlsplit

from harness.errors import BadRequest, Problem
from harness.grade.grades import CRITERIA, Grade, Grades
from harness.grade.sheet import Sheet
from harness.shape import check, parse

HOST = "127.0.0.1"
LARGEST = 4096  # bytes of a grade as it is sent; it takes about a hundred
PATIENCE = 10  # seconds for a request to be said
PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Said(TypedDict):
    """A grade as the page sends it; null takes it back."""

    rater: str
    answer: str
    criterion: str
    grade: Grade | None


@contextmanager
def serving(sheet: Sheet, grades: Grades, port: int = 0) -> Iterator[str]:
    """Answers in threads of its own while the block lasts. -> the page's address. `port`: 0 for any that is
    free. Raises BadRequest for one that is not."""
    try:
        server = Server(sheet, grades, port)
    except OSError as error:
        problem = Problem(f"{port}: {error.strerror}", "--port", remedy="another one, or none for any")
        raise BadRequest(problem) from error
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        server.server_close()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, sheet: Sheet, grades: Grades, port: int):
        super().__init__((HOST, port), Handler)
        self.sheet, self.grades, self.token = sheet, grades, secrets.token_urlsafe(24)
        self.hosts = [f"{name}:{self.server_port}" for name in (HOST, "localhost")]
        self.address = f"http://{self.hosts[0]}/{self.token}/"

    def handle_error(self, *connection: object) -> None:
        """A browser that hangs up is no news."""


class Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "tuneoff", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        self.answer({"": self.page, "start": self.start, "sheet": self.of_rater})

    def do_POST(self) -> None:
        self.answer({"grade": self.grade})

    def answer(self, places: dict) -> None:
        try:
            place = places.get(self.allowed())
            if place is None:
                raise Refused(404, "there is nothing here")
            place()
        except Refused as refused:
            self.reply(refused.status, {"error": str(refused)})
        except ValueError as error:
            self.reply(400, {"error": str(error)})
        except OSError as error:
            self.reply(500, {"error": error.strerror or str(error)})

    def allowed(self) -> str:
        """The place that is asked for, below the token. Raises Refused for a stranger."""
        if not ip_address(self.client_address[0]).is_loopback:
            raise Refused(403, "only this machine is answered")
        [host, *more] = self.headers.get_all("Host") or [""]
        if more or host not in self.server.hosts:
            raise Refused(403, f"only {HOST} is answered, under no other name")
        origin = self.headers.get("Origin", "" if self.command == "POST" else f"http://{host}")
        if origin != f"http://{host}":
            raise Refused(403, "only this server's own page may ask")
        _, token, place = [*urlsplit(self.path).path.split("/", 2), "", ""][:3]
        if not compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(404, "there is nothing here: take the address that the command printed last")
        return place

    def page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text("utf-8").replace("{nonce}", nonce)
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        self.send(200, "text/html; charset=utf-8", text.encode(), policy)

    def start(self) -> None:
        self.reply(200, self.server.sheet.start(self.server.grades))

    def of_rater(self) -> None:
        [name] = parse_qs(urlsplit(self.path).query).get("rater", [""])
        self.reply(200, self.server.sheet.of(name, self.server.grades))

    def grade(self) -> None:
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a grade is JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > LARGEST:
            raise Refused(413, f"a grade has at most {LARGEST} bytes")
        said = parse(self.rfile.read(int(length)))
        check(said, Said, "grade")
        if said["criterion"] not in CRITERIA:
            raise ValueError(f"the criteria are {', '.join(CRITERIA)}")
        row = self.server.sheet.row(said["answer"])
        self.server.grades.give(said["rater"], said["answer"], row, said["criterion"], said["grade"])
        self.reply(200, {"grade": said["grade"]})

    def reply(self, status: int, value: dict) -> None:
        self.send(status, "application/json; charset=utf-8", json.dumps(value).encode(), {})

    def send(self, status: int, kind: str, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        own = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (HEADERS | own | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *said: object) -> None:
        """Nothing: it would print the token, and what strangers ask for."""
