"""Group 6: processor time, memory, processes, files, waiting, output."""

from ra3_megatron.reward.problem import Outcome

from .attacks import Kind, parse

CALLS: tuple[Kind, ...] = ("calls", "stdin")

# They use processor time without end.
LOOPS = parse(
    6,
    r"""
#: loop_in_python places=import,call
while True: pass
#: loop_in_c
sum(range(10**18))
#: regex_backtracking
import re; re.match(r'(a+)+$', 'a' * 64 + 'b')
#: power ends=cpu_limit,memory
10 ** 10 ** 9
#: int_to_text ends=cpu_limit,memory
import sys; sys.set_int_max_str_digits(0); str(7 ** 10**7)
#: signals_ignored places=import,call
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
#: signals_blocked
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
#: limit_raised
import resource
try: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))
except (OSError, ValueError): pass
while True: pass
#: everything_swallowed
while True:
    try:
        while True: pass
    except BaseException: pass
#: finalizers_forever
class F:
    def __del__(self): F()
F()
while True:
    try:
        while True: F()
    finally: continue
#: threads_burn
import threading
def burn():
    while True: pass
for _ in range(4): threading.Thread(target=burn).start()
while True: pass
#: hash_collisions ends=cpu_limit,memory
d = {}
for i in range(10**7): d[i * (2**61 - 1)] = 0
""",
    places=("call",),
    kinds=CALLS,
    ends=(Outcome.CPU_LIMIT,),
)

OTHERS = parse(
    6,
    r"""
#: recursion ends=crashed,memory,cpu_limit,exception
import sys; sys.setrecursionlimit(10**9)
def f(): return f()
f()
#: recursion_in_c ends=crashed,memory,cpu_limit,exception
import sys; sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)
#: parser_nesting ends=memory,exception,crashed
eval('(' * 10**5 + ')' * 10**5)
#: segmentation_fault places=import,call ends=crashed,exception
import ctypes; ctypes.string_at(1)
#: memory_at_once ends=memory,exception cpu=2.0 memory=256
x = bytearray(100 << 30)
#: memory_in_steps ends=memory,exception cpu=2.0 memory=256
x = []
while True: x.append(bytearray(16 << 20))
#: memory_error_swallowed ends=memory,cpu_limit,crashed cpu=2.0 memory=256
x = []
while True:
    try: x.append(bytearray(1 << 20))
    except MemoryError: pass
#: memory_mapped ends=memory,exception cpu=2.0 memory=256
import mmap
x = []
while True: x.append(mmap.mmap(-1, 64 << 20))
#: small_objects ends=memory,exception,cpu_limit,crashed cpu=2.0 memory=256
x = []
while True: x.append([x, object()])
#: memfd ends=memory,exception,cpu_limit,crashed cpu=2.0 memory=256
import os
f = os.memfd_create('x')
while True: os.write(f, bytes(1 << 20))
#: fork_bomb ends=cpu_limit,exception
import os
while True:
    try: os.fork()
    except OSError: pass
#: forks_and_waits ends=exception,crashed
import os, time
while True:
    if os.fork() == 0: time.sleep(600)
#: spawns ends=exception
import subprocess, sys
while True: subprocess.Popen([sys.executable, '-c', 'while 1: pass'])
#: thread_bomb ends=exception,memory,wall_limit,cpu_limit wall=1.0 memory=256
import threading, time
for _ in range(20000): threading.Thread(target=time.sleep, args=(600,)).start()
#: daemon_thread_left ends=wrong,exception,crashed,missing
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
#: thread_left ends=wrong,wall_limit wall=1.0
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
#: file_of_2_gb ends=wrong,exception,cpu_limit,crashed,output,memory
with open('big', 'wb') as f:
    for _ in range(2000): f.write(bytes(1 << 20))
#: sparse_file ends=wrong,exception,cpu_limit,crashed,output,memory
import os
f = os.open('sparse', os.O_CREAT | os.O_RDWR); os.ftruncate(f, 1 << 40); os.pwrite(f, b'x', 1 << 39)
#: many_files ends=wrong,exception,cpu_limit,crashed,output,memory
for n in range(10**5): open(f'f{n}', 'w').close()
#: nested_folders ends=wrong,exception,cpu_limit,crashed,output,memory
import os
for _ in range(1500): os.mkdir('d'); os.chdir('d')
#: folder_without_rights ends=wrong,exception,cpu_limit,crashed,output,memory
import os
os.mkdir('locked'); open('locked/file', 'w').close(); os.chmod('locked', 0)
os.chmod('.', 0)
#: link_to_outside ends=wrong,exception,cpu_limit,crashed,output,memory
import os
os.symlink('{keep_dir}', 'link'); os.symlink('/', 'root')
#: hard_link ends=wrong,exception,cpu_limit,crashed,output,memory
import os
os.link('{secret_path}', 'hard')
#: fifo_and_odd_names ends=wrong,exception,cpu_limit,crashed,output,memory
import os
os.mkfifo('pipe'); open('\n-rf *', 'w').close(); os.mkdir(b'\xff\xfe')
#: descriptors ends=wrong,exception,cpu_limit,crashed,output,memory
import os
x = [os.open('.', os.O_RDONLY) for _ in range(10**5)]
#: sleep places=import,call ends=wall_limit wall=1.0
import time; time.sleep(3600)
#: lock ends=wall_limit wall=1.0
import threading
x = threading.Lock(); x.acquire(); x.acquire()
#: stops_itself ends=wall_limit,exception,crashed wall=1.0
import os, signal; os.kill(os.getpid(), signal.SIGSTOP)
#: waits_for_a_pipe ends=wall_limit wall=1.0
import os; os.read(os.pipe()[0], 1)
#: reads_on ends=wall_limit,wrong,exception wall=1.0
import sys; sys.stdin.read(); sys.stdin.read()
#: endless_stdout places=import,call ends=output,cpu_limit
while True: print('x' * 1000)
#: endless_stderr ends=output,cpu_limit
import sys
while True: print('x' * 1000, file=sys.stderr)
#: stdout_at_once ends=output,wrong,exception
print('x' * (1 << 24))
#: endless_warnings kinds=calls ends=output,cpu_limit
import warnings
while True: warnings.warn('x' * 99, stacklevel=1)
""",
    places=("call",),
    kinds=CALLS,
    ends=(),
)
RESOURCES = LOOPS + OTHERS
