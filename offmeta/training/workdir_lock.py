"""One run at a time in a workdir.

The lock is the operating system's on WORKDIR/.lock and ends with its holder,
however that ends; the file stays and says who holds or held it. On network
file systems Linux locks for all hosts.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
import warnings

from offmeta import disk

FILE = '.lock'
_MOST = 4096  # characters of it that are read; it has about 100
# File systems without locks.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class WorkdirBusyError(RuntimeError):
  """Another process runs in the workdir."""


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a workdir, which is made if need be; only the main process of a run.

  Raises:
    WorkdirBusyError: another process holds it; says which, and since when.
    OSError: the file cannot be written, or is a pipe or a folder; names it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / FILE
  if path.exists():
    disk.check_regular(path)
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise WorkdirBusyError(
        f'{workdir}: {_holder(file)} runs in this workdir; wait for it or stop'
        ' it, or use another --workdir'
      ) from error
    except OSError as error:
      if error.errno not in _UNKNOWN:
        raise
      warnings.warn(
        f'{workdir}: this file system has no locks ({error.strerror}); never'
        ' start two runs in one workdir',
        stacklevel=2,
      )
    with disk.naming(path):
      _describe(file)
    yield


def _describe(file):
  file.truncate(0)
  json.dump(
    {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    },
    file,
  )
  file.flush()


def _holder(file) -> str:
  """Who holds the lock, for people."""
  file.seek(0)
  try:
    holder = disk.parse_json(file.read(_MOST))
    return (
      f'process {holder["pid"]} on {holder["host"]} (since {holder["since"]})'
    )
  except (ValueError, KeyError, TypeError):  # it has not written it yet
    return 'another process'
