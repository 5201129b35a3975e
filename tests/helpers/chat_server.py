"""A server on this machine that speaks the chat completions protocol, answers as it is asked to, and can misbehave."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MARKED = re.compile(r"<<(.*?)>>")
ITEM = re.compile(r"^\d+\. (.*)$", re.MULTILINE)


def purpose_of(prompt):
    if '{"explanation"' in prompt:
        return "explain"
    return "fuzzing" if "<<" in prompt.split("numbered texts", 1)[1].split("\n", 1)[0] else "detection"


def perfect(prompt):
    """Names the word that is marked in most texts; tells texts, and marks, by that word."""
    items = ITEM.findall(prompt)
    purpose = purpose_of(prompt)
    if purpose == "explain":
        words = Counter(word.strip() for item in items for word in MARKED.findall(item))
        return json.dumps({"explanation": f"the word {words.most_common(1)[0][0]}"})
    word = re.search(r"the word (\S+)", prompt)[1]
    if purpose == "fuzzing":
        return json.dumps({"answers": [int(any(word in each for each in MARKED.findall(item))) for item in items]})
    return json.dumps({"answers": [int(word in item) for item in items]})


@dataclass
class Served:
    """Settings of a server, and the requests it saw."""

    url: str = ""
    answer: object = perfect
    """From a prompt to the content of the message."""
    misbehave: object = None
    """Called with the handler and the number of the request, from 1; True: it has answered in its own way."""
    requests: list = field(default_factory=list)
    """Bodies, in order."""
    answered: Counter = field(default_factory=Counter)
    """By body, how often a whole answer was given."""
    headers: list = field(default_factory=list)
    times: list = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: object = field(default_factory=threading.Lock)


@contextmanager
def chat_server(**told):
    served = Served(**told)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or every answer is late by 40 ms

        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            with served.lock:
                served.requests.append(body)
                served.headers.append(dict(self.headers))
                served.times.append(time.monotonic())
                number = len(served.requests)
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                if served.misbehave is None or not served.misbehave(self, number):
                    respond(self, 200, completion(served.answer(json.loads(body)["messages"][0]["content"])))
                    with served.lock:
                        served.answered[body] += 1
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with served.lock:
                    served.at_once -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


def respond(handler, status, body, **headers):
    content = body.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def reset(handler):
    """Breaks the connection without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
