"""A process that stands for one forked by `warm_server.py`: `python warm_client.py SOCKET ARGUMENT...`.

It imports next to nothing. Signals go through it, its output is the program's, and it ends as the program does.
"""

import json
import os
import signal
import socket
import sys


def main():
    server, *arguments = sys.argv[1:]
    told = os.environ.pop("WARM_TOLD", None)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "blocked": blocked}  # noqa: PTH109
    socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
    answers = connection.makefile()
    program = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda number, _: os.kill(program, number))
    if told is not None:
        os.write(int(told), f"{program}\n".encode())
        os.close(int(told))
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


main()
