"""A process that has imported everything and forks: what it starts begins at once, where an import takes seconds.

`warm_client.py` asks for programs on the Unix socket that is named on the command line, one a connection: it sends its
arguments, folder and environment with its three standard streams, and gets the process id and later the wait status.
If the client dies, its program is killed. The server ends when its standard input does.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module

LIBRARIES = (
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "endwise.cli",
    "endwise.analysis.pareto.page",
    "endwise.paper",
    "endwise.sweeps",
    "endwise.training.train",
)


def main():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    gc.disable()
    for library in LIBRARIES:
        import_module(library)
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")  # kept from then on
    # torchrun names its own functions from their frames, for which it looks through all modules each time.
    import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous").get_method_name = lambda depth=2: (
        sys._getframe(depth).f_code.co_name
    )
    os.fsync = lambda _descriptor: None  # as in conftest.py
    gc.freeze()  # a collection in a child would copy every page that it looks at
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user's Ctrl-C ends the tests, and they end this
    signal.signal(signal.SIGCHLD, reap)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in readable:
            return None
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return watch(connection)
        connection.close()


def reap(*_):
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def watch(connection):
    """Starts what the client asks for and tells it how that ended. In the program's own process, what to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(2**20)
    asked = json.loads(message)
    program = os.fork()
    if not program:
        connection.close()
        return lambda: run(asked, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{program}\n".encode())
    ender = os.fork()
    if not ender:
        connection.recv(1)
        os.kill(program, signal.SIGKILL)
        os._exit(0)
    _, status = os.waitpid(program, 0)
    os.kill(ender, signal.SIGKILL)
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def run(asked, streams):
    """As `python ARGUMENT...` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])  # the client's, not that of whoever began the server
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    first, *rest = asked["arguments"]
    code = 0
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, os.path.dirname(first))  # noqa: PTH120
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    # What the interpreter does at its end, but for taking its objects apart: that would copy all their pages.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program = main()
    if program is not None:
        program()
