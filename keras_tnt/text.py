"""Text of unknown origin, made fit for a message."""

import re
import reprlib
import sys

LONGEST = 100


def printable(text, longest=LONGEST):
    """Text that a stranger wrote, such as a name in a file, in the form that messages show.

    Args:
        text: a string, or anything else, shown as Python writes it.
        longest: characters that are shown of it.

    Returns:
        A string without control characters: line ends, terminal escapes, marks that reverse the
        direction of writing and lone surrogates stand as `\\n`, `\\x1b` and the like.
    """
    text = text if isinstance(text, str) else reprlib.repr(text)
    if len(text) > longest:
        text = text[:longest] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(text):
    """The first line of a message, whole, in the form of `printable`."""
    return printable((str(text).splitlines() or [""])[0], longest=10_000)


def escape_unencodable_output():
    """Lets stdout and stderr print what their encoding lacks as `\\u732b` and the like.

    A terminal or a pipe that is not UTF-8 ends a command otherwise, at the first such name.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure:
                reconfigure(errors="backslashreplace")


def is_line(text):
    """Whether a text is one line that is not blank."""
    return bool(text.strip()) and text.splitlines() == [text]


def is_encodable(text):
    """Whether UTF-8 can hold a text: a name of a file that is no UTF-8 it cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


# How messages of the library name arguments, and what one types in a shell instead.
FLAGS = (
    (re.compile(r"\bweights=None\b"), "--weights=none"),
    (re.compile(r"(?<![-\w(])weights='([^']*)'"), r"--weights=\1"),
    (re.compile(r"`(weights|model|top|out)`"), r"--\1"),
    (re.compile(r"a name of keras_tnt\.list_weights\(\)"), "a name that `keras-tnt list` gives"),
    (
        re.compile(r"keras_tnt\.create_model\('(\w+)'(?:, --weights=([^)]*))?[^)]*\)"),
        lambda found: f"--model={found[1]}" + (f" --weights={found[2]}" if found[2] else ""),
    ),
)


def as_flags(text):
    """Returns a message of the library with its advice as flags of a command."""
    for argument, flag in FLAGS:
        text = argument.sub(flag, text)
    return text
