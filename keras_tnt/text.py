"""Text of unknown origin, made fit for a message."""

import reprlib

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
