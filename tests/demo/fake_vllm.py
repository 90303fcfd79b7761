"""A stand-in for the `vllm` command: answers /health after a while, with a child that outlives a polite end.

Its behaviour comes from FAKE_VLLM: `ready`, `never` (no answer), `dies` (a traceback and exit code 1).
"""

import http.server
import os
import signal
import subprocess
import sys

arguments = sys.argv[1:]
print("arguments:", " ".join(arguments), flush=True)
behaviour = os.environ["FAKE_VLLM"]
if behaviour == "dies":
    print("(EngineCore pid=1) ERROR 11-24 10:03:04 [core.py:9] ValueError: the weights are not there", file=sys.stderr)
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
    sys.exit(1)

stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print("child:", child.pid, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if behaviour == "ready" and self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
