"""Confines a process before it runs untrusted code: it gives up resources and system calls.

This is the second wall. The first (sandlock's Landlock rules, or bubblewrap's namespaces) decides which files exist; this one
is an allow-list in the kernel (seccomp) of the calls that computing in Python needs. Calls that are not on the list fail: no
network, no new process or thread, no exec, no signal, no ptrace, no change of owner, mode or time of a file (Landlock does not
guard those), no shared memory, no memory file, no change of the limits themselves. Calls that two programs could use to
communicate fail too: new pipes (their numbers are counted for all), page faults, free memory, where links lead (files of other
processes), advice on memory (it drops files from memory). A call that a later kernel invents is not on the list either.
"""

import ctypes
import errno
import os
import resource
import sys

MACHINES = ("x86_64", "aarch64")

# System call: its number on x86_64 and on aarch64 (None: that machine has no such call).
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # Pipes and readable files.
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "lseek": (8, 62), "close": (3, 57), "open": (2, None), "openat": (257, 56), "fcntl": (72, 25),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # Metadata of files.
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "getdents64": (217, 61), "getcwd": (79, 17),
    # Memory.
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "brk": (12, 214),
    # The process itself: signal handlers, time, ids, exit.
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "setitimer": (38, 103), "alarm": (37, None), "restart_syscall": (219, 128), "futex": (202, 98), "sched_yield": (24, 124),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrandom": (318, 278),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sched_getaffinity": (204, 123),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _HAS_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x80000000
_X32 = 0x40000000
"""x86_64 numbers its second set of calls from here: none of them is allowed."""
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE = 22, 38, 2

_RULES: tuple[tuple[tuple[str, ...], int, int, tuple[int, ...], int], ...] = (
    # Duplicate a descriptor (0, 1030), get and set its flags (1, 2) and those of the file (3, 4). Other commands name a process
    # for a signal, which Landlock before version 6 delivers to any process of the user.
    (("fcntl",), 1, _EQUAL, (0, 1, 2, 3, 4, 1030), _ALLOW),
    # Wake and wait within the process (FUTEX_PRIVATE_FLAG), not in processes that have mapped the same file.
    (("futex",), 1, _HAS_BIT, (0x80,), _ALLOW),
    # No huge pages that the host set aside (MAP_HUGETLB): all processes see how many are left.
    (("mmap",), 3, _HAS_BIT, (0x40000,), _REFUSE),
    # Negative clocks are the processor times of other processes.
    (("clock_gettime", "clock_getres", "clock_nanosleep"), 0, _HAS_BIT, (0x80000000,), _REFUSE),
)
"""(calls, argument counted from 0, comparison, values, action): the action if the argument matches, else the opposite."""


def syscall_filter(machine: str) -> bytes:
    """Return the allow-list as a seccomp program of 8-byte instructions (code, jump if true, jump if false, operand)."""
    if machine not in MACHINES:
        raise ValueError(f"untrusted programs run on {' and '.join(MACHINES)} only, this machine is {machine!r}")
    column = MACHINES.index(machine)
    numbers = {number: name for name, pair in _ALLOWED.items() if (number := pair[column]) is not None}
    # The endings after the list of numbers: refuse, allow, and for each rule a check of the argument with both.
    endings = [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    target = dict.fromkeys(numbers.values(), 1)
    for calls, argument, comparison, values, action in _RULES:
        target |= dict.fromkeys(calls, len(endings))
        endings.append((_LOAD, 0, 0, 16 + 8 * argument))
        endings += [(comparison, len(values) - place, 0, value) for place, value in enumerate(values)]
        endings += [(_RETURN, 0, 0, _REFUSE if action == _ALLOW else _ALLOW), (_RETURN, 0, 0, action)]
    program = [
        (_LOAD, 0, 0, 4),  # the architecture: 32-bit calls have other numbers
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, len(numbers), 0, _X32),
        *(
            (_EQUAL, len(numbers) - place - 1 + target[numbers[number]], 0, number)
            for place, number in enumerate(sorted(numbers))
        ),
        *endings,
    ]
    return b"".join(
        code.to_bytes(2, sys.byteorder) + bytes((true, false)) + operand.to_bytes(4, sys.byteorder)
        for code, true, false, operand in program
    )


def confine(memory_bytes: int, cpu_seconds: int, open_files: int) -> None:
    """Give up resources and system calls for good: the process cannot regain them. No file can grow, not even in memory."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    program = syscall_filter(os.uname().machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, padded to eight bytes, and their address.
    header = (len(program) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(instructions).to_bytes(8, sys.byteorder)
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for option, first, second in ((_PR_SET_NO_NEW_PRIVS, 1, None), (_PR_SET_SECCOMP, _FILTER_MODE, header)):
        if libc.prctl(option, ctypes.c_ulong(first), second, zero, zero):
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed: the kernel cannot filter system calls")
