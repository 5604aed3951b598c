"""Runs one program against its test and says what became of it.

The job comes as JSON on standard input. The verdict goes to what was standard output, which the
program does not get, in lines that start with a number from the job. Limits, not a sandbox: a
program that looks for the number can find it.
"""

import contextlib
import json
import os
import signal
import sys
import types


def limit(job):
    import resource

    wanted = {
        "RLIMIT_CPU": job["seconds"],
        "RLIMIT_AS": job["memory"],
        "RLIMIT_FSIZE": job["file"],
        "RLIMIT_CORE": 0,
    }
    # Not RLIMIT_NPROC: it counts every process of the user.
    for name, value in wanted.items():
        which = getattr(resource, name, None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Some systems know a limit and do not set it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(which, (most, most))
    # Should the parent die, nobody else ends a program that sleeps.
    signal.alarm(job["seconds"])


def main():
    write, leave = os.write, os._exit
    channel = os.dup(1)
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    sys.path[:] = [place for place in sys.path if place]

    limit(job)
    start = job["nonce"].encode("ascii")
    write(channel, start + b" ready\n")
    try:
        test = compile(job["test"], "test", "exec", dont_inherit=True)
    except Exception as error:
        write(channel, start + f" broken-test {type(error).__name__}\n".encode("ascii"))
        leave(0)
    try:
        program = compile(job["source"], "candidate", "exec", dont_inherit=True)
    except BaseException:
        write(channel, start + b" no-program\n")
        leave(0)
    # A real module: dataclasses and pickle look for the one their class comes from.
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    space = module.__dict__
    entry_point = job["entry_point"]
    passed, failed = start + b" passed\n", start + b" failed "
    del job
    try:
        exec(program, space)
        exec(test, space)
        space["check"](space[entry_point])
    except BaseException as error:
        name = type(error).__name__
        if not name.isidentifier():
            name = "an exception"
        write(channel, failed + name[:80].encode("ascii", "replace") + b"\n")
        leave(0)
    write(channel, passed)
    leave(0)


main()
