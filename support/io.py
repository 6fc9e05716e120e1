"""Files: written whole or not at all; what is wrong with one that is read is an error of one line."""

import json
import os
import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from support.cli import UserError

try:
    import fcntl
except ImportError:  # Windows: there nothing is locked
    fcntl = None


def write_text(path, text):
    write_whole(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_json(path, content, indent=2):
    write_text(path, json.dumps(content, indent=indent))


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_json_lines(path, rows):
    write_text(path, json_lines(rows))


def write_whole(path, write):
    """Call write(temporary path beside `path`), bring it to the disk, then rename.

    A reader finds the old file or the new one, never a part.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    make_folder(path.parent)
    try:
        tmp.touch()
        mode = tmp.stat().st_mode  # as the umask wants it; safetensors makes its files for their owner alone
        write(tmp)
        tmp.chmod(mode)
        with open(tmp, "rb+") as f:  # Windows wants it open for writing
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # of a full disk, too
        raise UserError(
            f"{path}: could not be written ({error}); free some space or choose another --out. "
            "What was there is untouched"
        ) from None
    finally:
        tmp.unlink(missing_ok=True)


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
        raise UserError(f"{path}: this folder cannot be made ({why}); choose another --out") from None


def lock(path):
    """-> an open file. As long as it is open, and its process lives, no other program gets this lock.

    lockf and not flock: a loader process, which outlives a killed parent by seconds, does not inherit it.
    """
    if fcntl is None:
        return nullcontext()
    path = Path(path)
    make_folder(path.parent)
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{path}: held by another run, which still writes there; wait until it ends, or "
                        "choose another --out") from None
    return file


def fingerprint(files):
    """Tells files from others under the same names: their sizes, and bytes from all over each of them."""
    crc = 0
    for file in files:
        with reading(file), open(file, "rb") as f:
            size = os.path.getsize(file)
            for k in range(64):
                f.seek(size * k // 64)
                crc = zlib.crc32(f.read(4096), crc)
            crc = zlib.crc32(str(size).encode(), crc)
    return f"{crc:08x}"


class Progress:
    """What a program has done so far, in a file of JSON lines that grows; another run goes on from there.

    Its first line are the flags of the run: with others nothing goes on.
    """

    def __init__(self, path, flags, resume=True):
        self.path = Path(path)
        self.rows = []
        flags = json.loads(json.dumps(flags))  # tuples become lists
        if resume and self.path.exists():
            with reading(self.path):
                before, *self.rows = list(read_rows(self.path)) or [flags]
                check_flags(self.path, before, flags)
        write_json_lines(self.path, [flags, *self.rows])

    def add(self, rows):
        self.rows += rows
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))
        except OSError as error:
            why = f"could not be written ({error.strerror})"
            raise UserError(f"{self.path}: {why}; free some space, and go on with --resume") from None


def read_rows(path):
    """The rows of JSON lines, up to one that a kill has torn, or that is damaged."""
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):  # brackets nested without end
            return


def check_flags(path, before, now):
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(f"{path} was written with {name} {before.get(name)!r}, now it is {now[name]!r}; "
                            "give the same flags, or begin anew in another --out")


@contextmanager
def reading(path, hint="get the file again"):
    """Whatever goes wrong inside, while a file is read, parsed or mapped, becomes one line.

    It says which file, what is wrong, and what to do.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise OSError("a named pipe or a device, not a file")  # nobody may ever write into a pipe
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        todo = "check the path" if error.errno else hint  # Pillow's errors about content have no number
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {todo}") from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: damaged or of another kind ({what}); {hint}") from None


def read_json(path, missing=None):
    """The JSON object in a file; `missing` instead where there is no such file, if that is given."""
    path = Path(path)
    if missing is not None and not path.exists():
        return missing
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, not a JSON object; copy it anew")
    return found
