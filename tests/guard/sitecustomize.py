"""Refuses and records every attempt of a Python process to reach another machine; first on
PYTHONPATH, it guards subprocesses."""
import os, re, socket


def _own(host): # an address of this machine: only there can one listen
    if not re.fullmatch(r"[\d.]+", host): return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try: probe.bind((host, 0))
        except OSError: return False
    return True


def _local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return (
        host in (None, "", "localhost", "::", "::1", "0.0.0.0", socket.gethostname())
        or str(host).startswith(("127.", "::ffff:127."))
        or _own(str(host)))


def _refuse(what, address):
    if path := os.environ.get("UNLOC_TEST_SOCKETS"):
        with open(path, "a", encoding="utf-8") as file: file.write(f"{what} {address}\n")
    raise OSError(f"the tests forbid {what} to {address}")


def _guarded(name, plain):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(address[0]):
            _refuse(name, address)
        return plain(self, address)
    return connect


def _resolve(host, *args, plain=socket.getaddrinfo, **more):
    if not _local(host): _refuse("getaddrinfo", host)
    return plain(host, *args, **more)


for _name in ("connect", "connect_ex"):
    setattr(socket.socket, _name, _guarded(_name, getattr(socket.socket, _name)))
socket.getaddrinfo = _resolve
