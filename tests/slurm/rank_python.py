"""Stands in for Python in the jobs of the tests: `-m ra3_megatron ...` is forked by the zygote (zygote.py).

`Runs` makes a program of it, without site packages, since every rank of every test starts it.
"""

import array
import json
import os
import signal
import socket
import struct
import sys

assert sys.argv[1:3] == ["-m", "ra3_megatron"], sys.argv
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["RA3_TEST_ZYGOTE"])
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, _frame: connection.send(bytes([n])))
body = json.dumps({"argv": sys.argv[3:], "env": dict(os.environ), "cwd": os.getcwd()}).encode()
streams = array.array("i", [0, 1, 2])
connection.sendmsg([struct.pack("!I", len(body))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
connection.sendall(body)
answer = connection.recv(4)
if len(answer) < 4:
    sys.exit(1)
(code,) = struct.unpack("!i", answer)
sys.exit(code if code >= 0 else 128 - code)
