"""Another system, as small as can be: `python -m tests.procs.fake_server PORT [SECONDS_TO_START]` speaks just enough of
the completions API to be measured. It says a token every few milliseconds.

A child process, `fake-worker`, stands for the device: when it dies the server notices, and ends with status 0. It maps
shared memory under a name, and leaves it to be removed. The file that FAKE_SERVER_ASKED names is there once it was
asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
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
            time.sleep(TOKEN_S)
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
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    memory = SharedMemory(create=True, size=1 << 16)
    lock = get_context("spawn").Lock()
    for name, kind in ((memory._name, "shared_memory"), (lock._semlock.name, "semaphore")):
        resource_tracker.unregister(name, kind)  # as if their keeper had been killed too
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "fake-worker"])
    threading.Thread(target=lambda: (worker.wait(), os._exit(0)), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
