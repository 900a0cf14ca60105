"""State of an unfinished table: a journal of its rows, and the command that produces them.

A record of the journal is a line: a checksum of the rest, the index of the row in the table, and
the row as JSON. Records are appended in any order, so that rows that a power loss damaged can be
computed again. Incomplete records are ignored.
"""

import array
import contextlib
import json
import os
import re
import zlib

from keras_tnt import files
from keras_tnt.text import printable

LONGEST_RECORD = 64 * 2**20  # bytes
LARGEST_COMMAND = 16 * 2**20  # bytes
RECORD = re.compile(rb"([0-9a-f]{8}) (\d{1,15}) (\{.*\})\n", re.DOTALL)
BEGINS_AS_RECORD = re.compile(rb"[0-9a-f]{8} \d{1,15} \{")


class Rows:
    """Journal of a table's rows.

    Args:
        path: Path of the journal, which is created if missing.
        count: Number of rows of the complete table.
        batch: Number of rows per batch: if a row is missing, its whole batch is.

    Attributes:
        damaged: Number of damaged records that were found.

    Raises:
        ValueError: If another process writes it, or the path is not that of a journal.
    """

    def __init__(self, path, count, batch):
        """Opens and locks the journal, and finds its rows."""
        self.path, self.count, self.batch = path, count, batch
        # Offset of each row in the journal; -1 if it is missing.
        self.places = array.array("q", [-1]) * count
        self.file = open_state(path, flags=os.O_RDWR | os.O_CREAT)
        try:
            lock_descriptor(self.file, path)
            self.damaged = self.find()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self):
        """Returns the journal."""
        return self

    def __exit__(self, *_):
        """Closes the file."""
        self.file.close()

    def find(self):
        """Finds the rows in the journal; returns the number of damaged records."""
        records = earlier = other = nul = 0
        end = 0
        for start, line in read_lines(self.file):
            end = start + len(line)
            number = parse(line)[0]
            if number is not None:
                records += 1
                if number < self.count:
                    self.places[number] = start
            elif not line.endswith(b"\n") and len(line) < LONGEST_RECORD:
                other += records == earlier == 0  # interrupted while it was written
            elif records == other == 0 and is_of_earlier_version(line):
                earlier += 1
            else:
                other += 1
            if number is None:
                nul += b"\0" in line or bool(BEGINS_AS_RECORD.match(line))
        if earlier:
            return self.convert()
        if other and not records and not nul:
            raise ValueError(
                f"'{self.path}' is no state of `keras-tnt predict`: move it away, or say another "
                "--out."
            )
        if end and not self.ends_with_newline(end):
            self.cut(end)
        return other

    def ends_with_newline(self, end):
        """Returns whether the last of `end` bytes is a newline."""
        self.file.seek(end - 1)
        return self.file.read(1) == b"\n"

    def cut(self, end):
        """Removes an incomplete last record."""
        last = 0
        for start, _ in read_lines(self.file):
            last = start
        self.file.truncate(last)

    def convert(self):
        """Rewrites a journal of an earlier version, which has rows in order and no checksums.

        Rows after the first damaged one are computed again. Returns 0, the number of damaged
        records.
        """
        rows = []
        for _, line in read_lines(self.file):
            if not is_of_earlier_version(line) or len(rows) == self.count:
                break
            rows.append(json.loads(line))
        data, end = [], 0
        for number, row in enumerate(rows):
            data.append(record(number, row))
            self.places[number] = end
            end += len(data[-1])
        files.write_atomically(self.path, b"".join(data))
        self.file.close()
        self.file = open_state(self.path, flags=os.O_RDWR)
        lock_descriptor(self.file, self.path)
        return 0

    def missing(self):
        """Returns a bytearray with 1 for each batch that misses a row, else 0."""
        found = bytearray(-(-self.count // self.batch))
        for number, place in enumerate(self.places):
            if place < 0:
                found[number // self.batch] = 1
        return found

    def add(self, start, rows):
        """Appends rows, the first of which has the index `start`."""
        end = self.file.seek(0, os.SEEK_END)
        data = []
        for number, row in enumerate(rows, start):
            data.append(record(number, row))
            self.places[number] = end
            end += len(data[-1])
        self.file.write(b"".join(data))
        self.file.flush()  # so that rows survive the death of this process

    def __iter__(self):
        """Yields all rows in order.

        Raises:
            ValueError: If a row is missing, or was damaged meanwhile.
        """
        for number, place in enumerate(self.places):
            found = None, None
            if place >= 0:
                self.file.seek(place)
                found = parse(self.file.readline(LONGEST_RECORD))
            if found[0] != number:
                raise ValueError(
                    f"Row {number + 1} of {self.count} is missing in '{self.path}': images were "
                    "removed, or the file was changed, while the command ran. Run it again."
                )
            yield found[1]

    def remove(self):
        """Closes and removes the file."""
        self.file.close()  # Windows cannot remove an open file.
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path)


def record(number, row):
    """Returns a record of the journal, as bytes."""
    content = b"%d %s" % (number, json.dumps(row).encode())
    return b"%08x %s\n" % (zlib.crc32(content), content)


def parse(line):
    """Returns (index, row) of a record; (None, None) for an incomplete or damaged line."""
    found = RECORD.fullmatch(line)
    if not found or zlib.crc32(line[9:-1]) != int(found[1], 16):
        return None, None
    try:
        row = json.loads(found[3])
    except (ValueError, RecursionError):
        return None, None
    return (int(found[2]), row) if is_row(row) else (None, None)


def is_row(row):
    """Returns whether a value has the structure of a row."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        return False
    predictions = row.get("predictions", [])
    return (
        isinstance(row.get("error", ""), str)
        and isinstance(row.get("features", []), list)
        and isinstance(predictions, list)
        and all(isinstance(found, dict) for found in predictions)
    )


def is_of_earlier_version(line):
    """Returns whether a line is a row of an earlier version, without checksum."""
    if not line.startswith(b'{"file": ') or not line.endswith(b"\n"):
        return False
    try:
        return is_row(json.loads(line))
    except (ValueError, RecursionError):
        return False


def read_lines(file):
    """Yields (offset, line) of a binary file; a line that is too long comes in parts."""
    place = 0
    file.seek(0)
    while line := file.readline(LONGEST_RECORD):
        yield place, line
        place += len(line)


def open_state(path, flags):
    """Opens a journal: a regular file and not a link to one, which may belong to others."""
    try:
        return files.open_regular(path, follow=False, flags=flags)
    except ValueError as error:
        raise ValueError(f"{error} Remove it, or say another --out.") from error


def lock_descriptor(file, path):
    """Locks the journal, so that commands of earlier versions, which do the same, add no rows.

    Args:
        file: the open journal.
        path: path of the journal, for messages.

    Raises:
        ValueError: If such a command has locked it.
    """
    if files.fcntl is None:
        return
    try:
        files.fcntl.flock(file, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another process is writing '{path.removesuffix('.rows')}'.") from error
    except OSError:  # The file system has no locks.
        return


# === The command ===


def read_command(path):
    """Returns the command that a file describes, as a dict; `None` if there is no file.

    Args:
        path: path of the file.

    Raises:
        ValueError: If it is something else.
    """
    try:
        data = files.read_regular(path, LARGEST_COMMAND, follow=False)
        command = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        reason = f"it is nested too deeply, {error}" if isinstance(error, RecursionError) else error
    else:
        if isinstance(command, dict) and isinstance(command.get("number of images"), int):
            return command
        reason = "it describes no command"
    raise ValueError(
        f"'{path}' is no file of `keras-tnt predict` ({printable(str(reason), longest=300)}): move "
        "it away, or say another --out."
    )
