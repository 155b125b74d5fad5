"""A small HTTP server for tests that answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from serve.client import pcm_to_wav

ONE_SECOND = pcm_to_wav(np.full(24000, 100, "<i2").tobytes())


class FakeServer:
    """Answers from a list of (status, body[, headers]); the last one is repeated. Keeps what it was
    asked."""

    def __init__(self):
        self.answers: list[tuple] = [(200, ONE_SECOND)]
        self.asked: list[tuple[str, dict, bytes]] = []  # path, headers, body
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    outer.asked.append((self.path, dict(self.headers), body))
                    many = len(outer.answers) > 1
                    status, data, *more = outer.answers.pop(0) if many else outer.answers[0]
                self.send_response(status)
                headers = {"Content-Length": str(len(data))} | (more[0] if more else {})
                for item in headers.items():
                    self.send_header(*item)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def json(self, number: int = -1) -> dict:
        return json.loads(self.asked[number][2])

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
