"""Sanitizing of untrusted text for messages."""

import re
import reprlib
import sys

LONGEST = 100


def printable(text, longest=LONGEST):
    r"""Returns untrusted text, such as a name in a file, in a form that is safe to print.

    Args:
        text: a string, or any object, of which the `repr` is abbreviated.
        longest: maximum number of characters shown. Defaults to 100.

    Returns:
        A string without control characters: line ends, terminal escapes, bidirectional overrides
            and lone surrogates are escaped as `\n`, `\x1b` and the like.
    """
    text = text if isinstance(text, str) else reprlib.repr(text)
    if len(text) > longest:
        text = text[:longest] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(text):
    """Returns the first line of a message, escaped by `printable` and hardly abbreviated."""
    return printable((str(text).splitlines() or [""])[0], longest=10_000)


def escape_unencodable_output():
    r"""Makes stdout and stderr print characters that they cannot encode as `\u732b` and the like.

    Otherwise the first such name ends a command whose terminal or pipe is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure:
                reconfigure(errors="backslashreplace")


def is_line(text):
    """Returns whether text is a single, non-blank line."""
    return bool(text.strip()) and text.splitlines() == [text]


def is_encodable(text):
    """Returns whether UTF-8 can encode text; lone surrogates, as in some file names, it cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


# Patterns of argument names in the library's messages, and the flags that replace them.
FLAGS = (
    (re.compile(r"\bweights=None\b"), "--weights=none"),
    (re.compile(r"(?<![-\w(])weights='([^']*)'"), r"--weights=\1"),
    (re.compile(r"`(weights|model|top|out)`"), r"--\1"),
    (re.compile(r"--weights must be None\b"), "--weights must be none"),
    (re.compile(r"a name of keras_tnt\.list_weights\(\)"), "a name that `keras-tnt list` gives"),
    (
        re.compile(r"keras_tnt\.create_model\('(\w+)'(?:, --weights=([^,)]*))?[^)]*\)"),
        lambda found: f"--model={found[1]}" + (f" --weights={found[2]}" if found[2] else ""),
    ),
)


def as_flags(text):
    """Returns a message of the library with argument names replaced by the command's flags."""
    for argument, flag in FLAGS:
        text = argument.sub(flag, text)
    return text
