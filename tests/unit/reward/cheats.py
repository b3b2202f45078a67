"""Groups 1 to 3: exits, forged answers, forged protocol."""

from ra3_megatron.reward.problem import Outcome

from .attacks import ALL, FUNCTION, parse

WRONG, EXCEPTION, CRASHED, OUTPUT = Outcome.WRONG, Outcome.EXCEPTION, Outcome.CRASHED, Outcome.OUTPUT
BOTH = ("import", "call")

# A plain runner of function tests takes an exit code of 0 for a pass.
EXITS = parse(
    1,
    r"""
#: sys_exit
import sys; sys.exit(0)
#: os_exit
import os; os._exit(0)
#: system_exit
raise SystemExit
#: quit
quit()
#: exit
exit(0)
#: abort plain=no
import os; os.abort()
#: kill_self plain=no
import os; os.kill(os.getpid(), 9)
#: term_self plain=no
import os, signal; signal.raise_signal(signal.SIGTERM)
#: keyboard_interrupt plain=no
raise KeyboardInterrupt
#: atexit
import atexit, os; atexit.register(os._exit, 0)
#: excepthook
import sys, os; sys.excepthook = lambda *a: os._exit(0)
#: unraisablehook
import sys, os; sys.unraisablehook = lambda *a: os._exit(0)
raise SystemExit
#: thread_exits
import threading, os; threading.Timer(0.05, lambda: os._exit(0)).start()
import time; time.sleep(0.3)
#: thread_exits_later plain=no
import threading, os; threading.Timer(0.05, lambda: os._exit(0)).start()
#: output_then_crash places=program kinds=stdin ends=crashed,exception plain=no
import os, sys
print(sum(map(int, input().split()))); sys.stdout.flush()
os.abort()
#: output_then_exit_3 places=program kinds=stdin ends=crashed,exception plain=no
import sys
print(sum(map(int, input().split()))); sys.exit(3)
#: output_then_raise places=program kinds=stdin ends=exception plain=no
print(sum(map(int, input().split())))
raise ValueError
""",
    places=BOTH,
    ends=(WRONG, EXCEPTION, CRASHED),
    plain=FUNCTION,
)

# Answers that compare equal to everything, or that are hard to send.
FORGED = parse(
    2,
    r"""
#: equal_object
class A:
    def __eq__(self, *a): return True
    def __ne__(self, *a): return False
    def __bool__(self, *a): return True
    def __hash__(self, *a): return 0
    def __sub__(self, *a): return self
    def __rsub__(self, *a): return self
    def __add__(self, *a): return self
    def __abs__(self, *a): return self
    def __lt__(self, *a): return True
    def __gt__(self, *a): return True
    def __le__(self, *a): return True
    def __ge__(self, *a): return True
    def __len__(self, *a): return 1
    def __contains__(self, *a): return True
    def __instancecheck__(self, *a): return True
    def __float__(self, *a): return 0.0
    def __int__(self, *a): return 0
    def __round__(self, *a): return self
    def __index__(self, *a): return 0
def add(a, b): return A()
#: equal_int
class A(int):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: equal_float
class A(float):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: equal_str
class A(str):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
    def encode(self, *a): return b'5'
def add(a, b): return A()
#: equal_list
class A(list):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: equal_dict
class A(dict):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: equal_tuple
class A(tuple):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: equal_bytes
class A(bytes):
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    __hash__ = None
    def __sub__(self, o): return 0
def add(a, b): return A()
#: class_property
class A:
    __class__ = int
    def __eq__(self, o): return True
    def __sub__(self, o): return 0
def add(a, b): return A()
#: metaclass
class M(type):
    def __instancecheck__(c, o): return True
    def __eq__(c, o): return True
    __hash__ = None
    def __sub__(c, o): return 0
class A(metaclass=M): pass
def add(a, b): return A
#: subclass_mutates_class
class A(int):
    def __eq__(self, o): return True
    def __sub__(s, o): return 0
    def __int__(self): return 5
    def __index__(self): return 5
    def __repr__(self): return '5'
    __hash__ = None
    __str__ = __repr__
def add(a, b): return A()
#: float_hex
class A(float):
    def hex(self): return (5.0).hex()
    def __eq__(s, o): return True
    def __sub__(s, o): return 0
    __hash__ = None
def add(a, b): return A(0)
#: list_iterates_otherwise
class A(list):
    n = 0
    def __iter__(self): A.n += 1; return iter([A.n])
    def __len__(self): return 1
    def __eq__(s, o): return True
    def __sub__(s, o): return 0
def add(a, b): return A()
#: nan plain=no
def add(a, b): return float('nan')
#: reduce_payload
class A:
    def __reduce__(self): return (open, ('{write_dir}/reduced', 'w'))
    def __eq__(s, o): return True
    def __sub__(s, o): return 0
def add(a, b): return A()
#: array_like
class A:
    shape = ()
    dtype = float
    def __array__(self, *a, **k): return 5
    def __array_ufunc__(self, *a, **k): return True
    def __eq__(s, o): return True
    def __sub__(s, o): return 0
def add(a, b): return A()
#: huge_answer plain=no
def add(a, b): return 'x' * (1 << 24)
#: huge_int ends=output,wrong,exception,cpu_limit plain=no
def add(a, b): return 1 << (1 << 24)
#: deep_answer plain=no
def add(a, b):
    x = []
    for _ in range(10**5): x = [x]
    return x
#: cyclic_answer plain=no
def add(a, b):
    x = []; x.append(x)
    return x
#: shared_answer ends=output,wrong,exception,cpu_limit plain=no
def add(a, b):
    x = []
    for _ in range(60): x = [x, x]
    return x
#: endless_generator ends=output,wrong,exception,cpu_limit,memory plain=no
def add(a, b):
    while True: yield 1
#: mutates_arguments plain=no
def add(a, b):
    a.__class__ = b
    return 5
#: getattr_traps ends=wrong,exception,crashed plain=no
class A:
    def __getattribute__(self, n): raise SystemExit
def add(a, b): return A()
#: exception_with_traps ends=exception,crashed plain=no
class E(Exception):
    def __str__(self): raise SystemExit
    __repr__ = __str__
def add(a, b): raise E
#: assertion_named ends=exception,wrong plain=no
class AssertionError(Exception): pass
def add(a, b): raise AssertionError
""",
    kinds=FUNCTION,
    ends=(WRONG, EXCEPTION, OUTPUT),
    plain=FUNCTION,
)

FRAMES = r"""
import json, os, pickle, struct
texts = [json.dumps(v).encode() for v in (
    {"ok": True}, {"passed": True, "total": 3}, {"outcome": "passed", "passed": 3, "total": 3}, {"value": 5},
    {"result": 5}, {"status": "ok", "value": ["i", "5"]}, ["ok", 5], [0, 5], 5, "passed", True, None)]
texts += [pickle.dumps(("passed", 5)), b"passed", b"ok", b"\x00" * 64, b"\xff" * 64]
frames = []
for t in texts:
    frames += [t, t + b"\n"] + [struct.pack(f, len(t)) + t for f in ("<I", ">I", "<Q", ">Q")]
for fd in range(256):
    try:
        os.set_blocking(fd, False)
    except OSError:
        continue
    for frame in frames:
        try:
            os.write(fd, frame)
        except OSError:
            break
"""

# Written to whatever the program finds open.
PROTOCOL = parse(
    3,
    r"""
#: frames_to_all_descriptors
FRAMES
#: frames_then_exit
FRAMES

os._exit(0)
#: marker
print('All tests passed'); print('OK'); print('{"passed": true}')
import os; os._exit(0)
#: verdict_on_stdout
print('Verdict(outcome=passed, passed=3, total=3)', flush=True)
#: endless_replies ends=wrong,exception,crashed,output,cpu_limit,wall_limit
import os
while True:
    for fd in range(3, 64):
        try: os.write(fd, b'5\n' * 9999)
        except OSError: pass
#: reply_of_2_gib
import os, struct
for fd in range(3, 256):
    for f in ('<I', '>I', '<Q', '>Q'):
        try: os.write(fd, struct.pack(f, 2**31)); os.write(fd, b'x' * 4096)
        except OSError: break
#: stdout_closed
import sys, os
sys.stdout.close(); sys.stderr.close(); sys.stdin.close()
for n in (0, 1, 2):
    try: os.close(n)
    except OSError: pass
#: all_closed
import os; os.closerange(0, 4096)
#: descriptors_swapped ends=wrong,exception,crashed,output,wall_limit
import os
r, w = os.pipe()
for n in range(64):
    if n not in (r, w):
        try: os.fstat(n); os.dup2(w, n)
        except OSError: pass
#: requests_eaten ends=wrong,exception,crashed,output,wall_limit
import os
for n in range(64):
    try:
        os.set_blocking(n, False); os.read(n, 1 << 20)
    except (OSError, ValueError): pass
""",
    macros={"FRAMES": FRAMES},
    places=BOTH,
    kinds=ALL,
    ends=(WRONG, EXCEPTION, CRASHED, OUTPUT),
)
