"""Programs that reach for the host."""

from attacks.base import CRASHED, FAILED, REFUSED, Attack

HOST = [
    Attack(
        "reads files of the host",
        """
def solve(a, b):
    return tried(
        **{
            n: lambda n=n: open(n, "rb").read(99)
            for n in (
                CANARY,
                "/etc/passwd",
                "/etc/shadow",
                "/root/.bashrc",
                "/proc/1/environ",
                "/dev/mem",
                "/sys/kernel/notes",
            )
        },
        listing=lambda: os.listdir(FOLDER),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "writes files of the host",
        """
def solve(a, b):
    return tried(
        append=lambda: open(CANARY, "a").write("x"),
        truncate=lambda: os.truncate(CANARY, 0),
        new=lambda: open(FOLDER + "/new", "w"),
        folder=lambda: os.mkdir(FOLDER + "/new"),
        tmp=lambda: open("/tmp/neuromas-attack", "w"),
        here=lambda: open("here", "w"),
        node=lambda: os.mkfifo(FOLDER + "/fifo"),
        packages=lambda: open(os.path.dirname(os.__file__) + "/site-packages/new", "w"),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "deletes and renames",
        """
import shutil

def solve(a, b):
    return tried(
        unlink=lambda: os.unlink(CANARY),
        rename=lambda: os.rename(CANARY, CANARY + "2"),
        tree=lambda: shutil.rmtree(FOLDER),
        rmdir=lambda: os.rmdir(FOLDER),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "changes mode, owner, times, attributes",
        """
def solve(a, b):
    return tried(
        chmod=lambda: os.chmod(CANARY, 0o777),
        chown=lambda: os.chown(CANARY, 1, 1),
        utime=lambda: os.utime(CANARY, (0, 0)),
        xattr=lambda: os.setxattr(CANARY, "user.x", b"1"),
        raw=lambda: call(90, CANARY.encode(), 0o777),
        raw2=lambda: call(452, -100, CANARY.encode(), 0o777, 0),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "links",
        """
def solve(a, b):
    return tried(
        sym=lambda: os.symlink(CANARY, FOLDER + "/sym"),
        hard=lambda: os.link(CANARY, FOLDER + "/hard"),
        tmp=lambda: os.symlink(CANARY, "/tmp/neuromas-link"),
        through=lambda: open("/proc/self/root" + CANARY).read(),
        cwd=lambda: open("/proc/self/cwd" + CANARY).read(),
        up=lambda: open("../../../../../.." + CANARY).read(),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "network",
        """
import socket

def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))

def unix():
    socket.socket(socket.AF_UNIX).connect(SOCKET)

def solve(a, b):
    return tried(
        tcp=lambda: socket.create_connection(("127.0.0.1", PORT), 1),
        udp=udp,
        unix=unix,
        raw=lambda: call(41, 2, 1, 0),
        pair=socket.socketpair,
        names=lambda: socket.getaddrinfo("localhost", 80, proto=17),
        server=lambda: socket.create_server(("127.0.0.1", 0)),
    )
""",
        FAILED,
        "AssertionError: ({'names': .*}|all refused)",
    ),
    Attack(
        "signals",
        """
def solve(a, b):
    return tried(
        **{str(p): lambda p=p: os.kill(p, 9) for p in (PID, os.getppid(), -1, 1)},
        group=lambda: os.killpg(0, 9),
        thread=lambda: call(234, PID, PID, 9),
        queue=lambda: call(129, PID, 9, 0),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "kernel interfaces",
        """
def solve(a, b):
    return tried(
        **{
            n: lambda k=k: call(k, 0, 0, 0, 0, 0)
            for n, k in dict(
                unshare=272,
                mount=165,
                umount=166,
                chroot=161,
                bpf=321,
                perf=298,
                io_uring=425,
                userfault=323,
                setns=308,
                module=175,
                setuid=105,
                capset=126,
                prctl=157,
                seccomp=317,
                personality=135,
                reboot=169,
                sethostname=170,
                settime=227,
                inotify=253,
                landlock=444,
            ).items()
        }
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "imports what trains it",
        """
def solve(a, b):
    return tried(
        neuromas=lambda: __import__("neuromas"),
        torch=lambda: __import__("torch"),
        sandlock=lambda: __import__("sandlock"),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "packages beside the standard library",
        """
import glob

def solve(a, b):
    folders = {
        f"{root}/{name}/{kind}-packages"
        for root in (sys.prefix + "/lib", sys.base_prefix + "/lib", "/lib", "/usr/lib", "/usr/local/lib")
        for name in ("python3", f"python3.{sys.version_info.minor}")
        for kind in ("site", "dist")
    }
    sys.path += sorted(folders)
    inside = os.open(os.path.dirname(os.__file__), os.O_RDONLY)
    return tried(
        **{n: lambda n=n: os.listdir(n)[0] for n in folders},
        **{n: lambda n=n: __import__(n) for n in ("pip", "setuptools", "numpy", "_distutils_hack")},
        relative=lambda: os.listdir(os.open("site-packages", os.O_RDONLY, dir_fd=inside))[0],
        dots=lambda: open(os.path.dirname(os.__file__) + "/json/../site-packages/README.txt").read(),
        chdir=lambda: os.chdir(os.path.dirname(os.__file__) + "/site-packages"),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "timer that ends it",
        """
import signal

def solve(a, b):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while True:
        pass
""",
        CRASHED,
    ),
    Attack(
        "pipes of other processes by way of /dev/fd",
        """
def solve(a, b):
    ways = ("/proc/{}/{}", "/dev/fd/../../{}/{}", "/dev/fd/../task/../../{}/{}", "/dev/../proc/{}/{}")
    names = ["mem", "environ", "root" + CANARY, *(f"fd/{n}" for n in range(12))]
    return tried(
        **{
            path + str(mode): lambda path=path, mode=mode: os.open(path, mode | os.O_NONBLOCK)
            for path in [way.format(pid, name) for way in ways for pid in (os.getppid(), PID, 1) for name in names]
            for mode in (os.O_RDONLY, os.O_WRONLY)
        },
        own=lambda: open("/dev/fd/../root" + CANARY).read(),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "words with programs that run at once, notes for those that come",
        """
import errno, mmap, resource, time

def huge():
    try:
        return call(9, 0, 1 << 21, 3, 0x40022, -1, 0)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise
        return "none are left"

def solve(a, b):
    code = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value & ~4095
    mine = mmap.mmap(-1, 4096)
    return tried(
        wake=lambda: call(202, code, 1, 1, 0, 0, 0),
        wait=lambda: call(202, code, 0, ctypes.c_uint32.from_address(code).value, (ctypes.c_long * 2)(), 0, 0),
        pipe=os.pipe,
        faults=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        resident=lambda: call(27, code, 4096, ctypes.create_string_buffer(1)),
        sysinfo=lambda: call(99, ctypes.create_string_buffer(256)),
        drop=lambda: mine.madvise(mmap.MADV_DONTNEED),
        link=lambda: os.readlink("/proc/self"),
        descriptor=lambda: os.readlink("/proc/%d/fd/4" % os.getppid()),
        judge=lambda: time.clock_gettime(~os.getppid() << 3 | 2),
        huge=huge,
    )
""",
        FAILED,
        REFUSED,
    ),
]
