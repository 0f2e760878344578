"""The system calls that a program may make, with their numbers on x86-64 and on ARM.

A list of what is allowed, so that a call that nobody thought of is refused: with EPERM, or with ENOSYS where it is
newer than this list, as the C library expects of an older kernel. What is left out on purpose: every way to start a
process or another program, to signal, trace, renice or pin others, to lock files, to reach anybody by a socket, to make
memory that no limit counts (memfd, System V, message queues), to change owners, modes and attributes (Landlock does not
see those), io_uring (which no filter sees), namespaces, mounts and keys. Nor can a program make folders and links,
remove or rename: what it writes lies where a look into its folder sees it, and the folder can be removed whatever it
did.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux; tests/test_sandbox.py
holds them against the headers of the machine. None: that architecture has no such call.
"""

from __future__ import annotations

Numbers = tuple[int | None, int | None]  # x86-64, ARM
NEWEST = 450  # greater numbers are calls that this list does not know

ALLOWED: dict[str, Numbers] = {
    # files, by descriptor
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "fadvise64": (221, 223),
    "copy_file_range": (326, 285),
    "sendfile": (40, 71),
    # files, by name
    "creat": (85, None),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "umask": (95, 166),
    # waiting
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "wait4": (61, 260),
    "waitid": (247, 95),
    # time
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "timer_create": (222, 107),
    "timer_settime": (223, 110),
    "timer_gettime": (224, 108),
    "timer_delete": (226, 111),
    # memory, each counted by RLIMIT_AS
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "msync": (26, 227),
    "mincore": (27, 232),
    "membarrier": (324, 283),
    # signals that it handles itself
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    # a pair of sockets that it has to itself, as asyncio wakes its loop; nobody else can be reached by one
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    # itself and its threads
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "sched_yield": (24, 124),
    "getcpu": (309, 168),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgrp": (111, None),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),  # it can only lower what it has
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
}

# Allowed only with some arguments (filter.py).
CLONE: Numbers = (56, 220)
CLONE3: Numbers = (435, 435)  # ENOSYS: its flags stand in memory, where no filter reads; the C library falls back
OPEN: Numbers = (2, None)
OPENAT: Numbers = (257, 56)
IOCTL: Numbers = (16, 29)
FCNTL: Numbers = (72, 25)
PRCTL: Numbers = (157, 167)
PRLIMIT: Numbers = (302, 261)
SOCKETPAIR: Numbers = (53, 199)
CLOCK_GETTIME: Numbers = (228, 113)
SCHED_GETAFFINITY: Numbers = (204, 123)
