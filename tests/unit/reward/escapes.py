"""Group 7: ways out of the sandbox.

An escape answers `yes`, or with the canary's token, when it has got through, and its tests ask for that answer; what
it does to the outside is looked at there. `{names}` stand for canaries that `canaries.py` sets up.
"""

import textwrap

from ra3_megatron.reward.problem import Outcome

from .attacks import YES, Attack, Kind, parse

CALLS: tuple[Kind, ...] = ("calls", "stdin")
ENDS = (Outcome.WRONG, Outcome.EXCEPTION, Outcome.CRASHED)
MACROS = {
    "SYSCALL": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)",
    "FIND": "import re\nfind = lambda t: re.findall(('ANS' + 'WER-[0-9a-f]{16}-' + str(a)).encode(), t)",
}


def _attempt(lines: str) -> str:
    """A program that returns what `lines` do, and `no` with the reason when they raise."""
    return (
        f"import os, sys\ndef add(a, b):\n    try:\n{textwrap.indent(lines, ' ' * 8)}\n"
        "    except Exception as e:\n        return 'no: ' + repr(e)\n    return 'no'"
    )


def _ways(text: str) -> tuple[Attack, ...]:
    return parse(7, text, macros=MACROS, wrap=_attempt, kinds=CALLS, ends=ENDS, plain=CALLS, tests=YES)


NETWORK = _ways(r"""
#: tcp
import socket
socket.create_connection(('127.0.0.1', {tcp_port}), 1).send(b'hello')
return 'yes'
#: udp
import socket
socket.socket(2, 2).sendto(b'hello', ('127.0.0.1', {udp_port}))
return 'yes'
#: tcp_v6 plain=no
import socket
s = socket.socket(socket.AF_INET6); s.settimeout(1); s.connect(('::1', {tcp_port})); return 'yes'
#: dns plain=no
import socket
socket.getaddrinfo('example.com', 80)
return 'yes'
#: abstract_socket
import socket
s = socket.socket(socket.AF_UNIX); s.settimeout(1)
s.connect('\0{abstract}')
s.send(b'hello')
return 'yes'
#: unix_socket
import socket
s = socket.socket(socket.AF_UNIX); s.settimeout(1); s.connect('{socket_path}')
s.send(b'hello')
return 'yes'
#: raw_socket plain=no
import socket
socket.socket(2, 3, 1)
return 'yes'
#: netlink
import socket
socket.socket(16, 3, 0)
return 'yes'
#: socket_pair_of_processes plain=no
import multiprocessing as m
m.Process(target=print).start()
return 'yes'
""")

HOST_FILES = _ways(r"""
#: write_outside
open('{write_dir}/written', 'w').write('x')
return 'yes'
#: write_library plain=no
p = os.path.join(os.path.dirname(os.__file__), 'ra3_attack.py')
open(p, 'w')
os.remove(p)
return 'yes'
#: rename_outside plain=no
open('x', 'w').close(); os.rename('x', '{write_dir}/renamed')
return 'yes'
#: unlink_outside plain=no
os.remove('{keep_dir}/kept')
return 'yes'
#: read_file tests=secret
FIND
return find(open('{secret_path}', 'rb').read())[0].decode()
#: read_by_link plain=no tests=secret
FIND
os.symlink('{secret_path}', 'l'); return find(open('l', 'rb').read())[0].decode()
#: read_passwd
return 'yes' if ':0:0:' in open('/etc/passwd').read() else 'no'
#: list_home
return 'yes' if os.listdir('{keep_dir}') else 'no'
#: read_environment tests=secret
FIND
return find(repr(dict(os.environ)).encode())[0].decode()
#: read_all_environments tests=secret
FIND
for p in os.listdir('/proc'):
    try: t = find(open(f'/proc/{p}/environ', 'rb').read())
    except OSError: continue
    if t: return t[0].decode()
#: read_all_commands tests=secret
FIND
for p in os.listdir('/proc'):
    try: t = find(open(f'/proc/{p}/cmdline', 'rb').read())
    except OSError: continue
    if t: return t[0].decode()
#: root_of_another tests=secret
FIND
for p in os.listdir('/proc'):
    try: t = find(open(f'/proc/{p}/root{secret_path}', 'rb').read())
    except OSError: continue
    if t: return t[0].decode()
#: stat_outside plain=no
return 'yes' if os.stat('{keep_dir}/kept').st_size else 'no'
#: chroot_out plain=no
SYSCALL
os.mkdir('c'); os.chroot('c')
return 'yes'
#: block_device plain=no
os.mknod('dev', 0o60600, os.makedev(8, 0))
return 'yes'
""")

OTHER_PROCESSES = _ways(r"""
#: kill_other plain=no
os.kill({victim_pid}, 9)
return 'yes'
#: kill_parent plain=no
for s in (9, 15, 19): os.kill(os.getppid(), s)
return 'yes'
#: kill_everyone plain=no
os.kill(-1, 9)
return 'yes'
#: kill_group_0 plain=no
import signal
signal.signal(15, signal.SIG_IGN); os.kill(0, 15); os.killpg(os.getpgid(os.getppid()), 9)
return 'yes'
#: pidfd plain=no
import signal
signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)
return 'yes'
#: trace_parent plain=no
SYSCALL
return 'yes' if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 'no'
#: memory_of_parent plain=no
open(f'/proc/{os.getppid()}/mem', 'rb')
return 'yes'
#: vm_read_of_parent plain=no
SYSCALL
b = ctypes.create_string_buffer(64)
class V(ctypes.Structure):
    _fields_ = [('b', ctypes.c_void_p), ('l', ctypes.c_size_t)]
l, r = V(ctypes.addressof(b), 64), V(ctypes.addressof(b), 64)
n = libc.process_vm_readv(os.getppid(), ctypes.byref(l), 1, ctypes.byref(r), 1, 0)
return 'yes' if n > 0 else 'no'
#: limits_of_parent plain=no
import resource
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))
return 'yes'
#: priority_of_parent plain=no
os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
return 'yes'
#: daemon
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time; time.sleep(0.5)
        open('{write_dir}/daemon', 'w').write('x')
    os._exit(0)
return 'yes'
#: vfork plain=no
SYSCALL
return 'yes' if libc.syscall(57) > 0 else 'no'
#: clone3 plain=no
SYSCALL
b = (ctypes.c_uint64 * 11)()
b[4] = 17
n = libc.syscall(435, b, 88)
if n == 0: os._exit(0)
return 'yes' if n > 0 else 'no'
#: exec_shell
os.posix_spawn('/bin/sh', ['sh', '-c', 'echo x > {write_dir}/shell'], {})
return 'yes'
#: exec_in_place plain=no
os.execv('/bin/sh', ['sh', '-c', 'echo yes; echo x > {write_dir}/exec'])
#: exec_python plain=no
os.execv(sys.executable, ['python', '-c', 'print("yes")'])
#: system
return 'yes' if os.system('true') == 0 else 'no'
""")

KERNEL = _ways(r"""
#: user_namespace plain=no
os.unshare(0x10000000)
return 'yes'
#: network_namespace plain=no
os.unshare(0x40000000)
return 'yes'
#: mount plain=no
SYSCALL
r = libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)
return 'yes' if r == 0 else 'no'
#: io_uring plain=no
SYSCALL
return 'yes' if libc.syscall(425, 4, (ctypes.c_char * 120)()) >= 0 else 'no'
#: bpf plain=no
SYSCALL
return 'yes' if libc.syscall(321, 0, (ctypes.c_char * 64)(), 64) >= 0 else 'no'
#: keyring plain=no
SYSCALL
return 'yes' if libc.syscall(248, b'user', b'ra3', b'x', 1, -3) >= 0 else 'no'
#: perf_events plain=no
SYSCALL
b = (ctypes.c_uint32 * 32)()
b[0] = 1; b[1] = 128
return 'yes' if libc.syscall(298, b, 0, -1, -1, 0) >= 0 else 'no'
#: userfaultfd plain=no
SYSCALL
return 'yes' if libc.syscall(323, 1) >= 0 else 'no'
#: thirty_two_bit plain=no
SYSCALL
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex('b814000000cd80c3'))
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
return 'yes' if f() > 0 else 'no'
#: x32_numbers plain=no
SYSCALL
return 'yes' if libc.syscall(0x40000000 + 41, 2, 1, 0) >= 0 else 'no'
#: become_root plain=no
os.setuid(0)
return 'yes'
#: become_another plain=no
os.setresuid(65533, 65533, 65533)
return 'yes'
#: terminal plain=no
import fcntl
fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), 0x5412, b'x')
return 'yes'
#: shared_memory_segment plain=no
SYSCALL
return 'yes' if libc.shmget(0x5A33, 4096, 0o1666) >= 0 else 'no'
#: message_queue plain=no
SYSCALL
return 'yes' if libc.msgget(0x5A33, 0o1666) >= 0 else 'no'
""")
ESCAPES = NETWORK + HOST_FILES + OTHER_PROCESSES + KERNEL

# What one job leaves is looked for by the next, on the same worker.
LEAVE, FIND_TRACES = TRACES_LEFT = parse(
    7,
    r"""
#: leave_traces
import os, sys, builtins, json, collections
for folder in ('.', '/tmp', '/dev/shm', '/var/tmp', os.path.expanduser('~')):
    try: open(os.path.join(folder, 'left'), 'w').write('yes')
    except OSError: pass
builtins.left = json.left = sys.left = collections.left = 'yes'
json.loads = lambda *a: 'yes'
os.environ['LEFT'] = 'yes'
def add(a, b): return 'left'
#: find_traces
import os, sys, builtins, json, collections
def add(a, b):
    for folder in ('.', '/tmp', '/dev/shm', '/var/tmp', os.path.expanduser('~')):
        if os.path.exists(os.path.join(folder, 'left')): return 'yes'
    if any(hasattr(m, 'left') for m in (builtins, json, sys, collections)): return 'yes'
    return 'yes' if 'LEFT' in os.environ or json.loads('1') == 'yes' else 'no'
""",
    kinds=CALLS,
    ends=(Outcome.WRONG,),
    tests=YES,
)
# No attack: shows that tests that an escape would pass can be passed.
(CONTROL_YES,) = parse(
    9, "#: control_yes\ndef add(a, b): return 'yes'", ends=(Outcome.PASSED,), tests=YES, plain=("calls",)
)
