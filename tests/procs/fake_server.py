"""Another system, as small as can be: `python -m tests.procs.fake_server PORT` speaks just enough of the completions
API to be measured. It says a token every few milliseconds, as long as its worker lives.

A child process, `fake-worker`, stands for the device: when it dies the server notices, and ends with status 0. It maps
shared memory under a name, and leaves it to be removed. The file that FAKE_SERVER_ASKED names is there once it was
asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context, resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

TOKEN_S = 0.005


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": []}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked := os.environ.get("FAKE_SERVER_ASKED"):
            Path(asked).touch()
        self.send_response(200)
        self.end_headers()
        for index in range(body["max_tokens"]):
            if self.server.worker_gone.wait(TOKEN_S):
                return
            last = index + 1 == body["max_tokens"]
            self.tell({"choices": [{"text": f" {index}", "finish_reason": "length" if last else None}]})
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": len(body["prompt"])}
        self.tell({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *args):
        pass


def main() -> None:
    memory = SharedMemory(create=True, size=1 << 16)
    lock = get_context("spawn").Lock()
    for name, kind in ((memory._name, "shared_memory"), (lock._semlock.name, "semaphore")):
        resource_tracker.unregister(name, kind)  # as if their keeper had been killed too
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.worker_gone = threading.Event()
    # It waits for the end of a pipe that nobody writes to: it goes with this process.
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "fake-worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE)

    def watch() -> None:
        worker.wait()
        server.worker_gone.set()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
